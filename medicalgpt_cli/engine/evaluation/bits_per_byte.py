"""How well a model predicts plain text, by source and language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from medicalgpt_cli.engine.data.packing import Block, HeldOut
from medicalgpt_cli.engine.evaluation.batched import by_length, in_batches, never
from medicalgpt_cli.engine.evaluation.heldout import figures
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.losses import target_loss


def text_loss(
    model: torch.nn.Module,
    text: HeldOut,
    collate: Callable[[Sequence[Block]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = never,
) -> dict[str, Any] | None:
    """Loss over every token of the held-out windows, however they are batched.

    Returns:
        The `figures` of all windows (every byte of a measured document counts), and `parts`: the same by
        source and language. None where `should_stop` said so.
    """
    groups, blocks = list(text.bytes), [window.block for window in text.windows]
    batches: list[list[int]] = []
    group_of: list[tuple[str, str]] = []  # of each batch
    for group in groups:
        inside = [index for index, window in enumerate(text.windows) if window.group == group]
        pieces = by_length([len(blocks[index].input_ids) for index in inside], batch_size)
        batches += [[inside[place] for place in piece] for piece in pieces]
        group_of += [group] * len(pieces)
    losses = in_batches(
        model,
        blocks,
        batches,
        collate,
        lambda batch: float(target_loss(model, batch)),
        task="measuring held-out text",
        unit="blocks",
        observer=observer,
        should_stop=should_stop,
    )
    if losses is None:
        return None
    totals, tokens = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0)
    for group, batch, loss in zip(group_of, batches, losses, strict=True):
        totals[group] += loss
        tokens[group] += sum(len(blocks[index].targets) for index in batch)
    parts = [
        {
            "source": group[0],
            "language": group[1],
            **figures(totals[group], tokens[group], text.bytes[group]),
        }
        for group in totals
    ]
    whole = figures(sum(totals.values()), sum(tokens.values()), sum(text.bytes.values()))
    return {**whole, "parts": parts}
