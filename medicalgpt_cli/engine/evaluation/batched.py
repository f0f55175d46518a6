"""One forward pass after the other over held-out items, the model in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from medicalgpt_cli.engine.observer import Observer

Result = TypeVar("Result")


def never() -> bool:
    """Nothing asks to stop."""
    return False


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, shortest first."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def in_batches(
    model: torch.nn.Module,
    items: Sequence[Any],
    batches: Sequence[Sequence[int]],
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    compute: Callable[[dict[str, torch.Tensor]], Result],
    *,
    task: str,
    unit: str,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = never,
) -> list[Result] | None:
    """What `compute` gives for each batch; None where `should_stop` said so between two of them.

    Args:
        batches: indices of `items`. task, unit: what the observer is told.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found: list[Result] = []
    done = 0
    if observer:
        observer.on_task_start(task, sum(map(len, batches)), unit)
    try:
        for piece in batches:
            if should_stop():
                return None
            batch = collate([items[index] for index in piece])
            found.append(compute({name: value.to(device) for name, value in batch.items()}))
            done += len(piece)
            if observer:
                observer.on_task_advance(task, done)
    finally:
        model.train(training)
        if observer:
            observer.on_task_end(task)
    return found
