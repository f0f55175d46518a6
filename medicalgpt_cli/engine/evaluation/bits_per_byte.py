"""How well a model predicts plain text, by source and language."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from medicalgpt_cli.engine.data.packing import Block, HeldOut
from medicalgpt_cli.engine.evaluation.batched import by_length, in_batches, never
from medicalgpt_cli.engine.evaluation.heldout import apart, figures
from medicalgpt_cli.engine.evaluation.paired import PerItem, per_text
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.losses import target_nats


def window_nats(
    model: torch.nn.Module,
    text: HeldOut,
    collate: Callable[[Sequence[Block]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = never,
) -> list[float] | None:
    """The nats of each window, over its targets; None where `should_stop` said so."""
    groups, blocks = list(text.bytes), [window.block for window in text.windows]
    batches: list[list[int]] = []
    for group in groups:
        inside = [index for index, window in enumerate(text.windows) if window.group == group]
        pieces = by_length([len(blocks[index].input_ids) for index in inside], batch_size)
        batches += [[inside[place] for place in piece] for piece in pieces]
    found = in_batches(
        model,
        blocks,
        batches,
        collate,
        lambda batch: target_nats(model, batch).tolist(),
        task="measuring held-out text",
        unit="blocks",
        observer=observer,
        should_stop=should_stop,
    )
    if found is None:
        return None
    nats = [0.0] * len(blocks)
    for batch, of_batch in zip(batches, found, strict=True):
        for index, values in zip(
            batch, apart(of_batch, (len(blocks[i].targets) for i in batch)), strict=True
        ):
            nats[index] = math.fsum(values)
    return nats


def text_figures(text: HeldOut, nats: Sequence[float]) -> dict[str, Any]:
    """The `figures` of all windows (every byte of a measured document counts), and `parts`: by source and language."""
    totals, tokens = dict.fromkeys(text.bytes, 0.0), dict.fromkeys(text.bytes, 0)
    for window, loss in zip(text.windows, nats, strict=True):
        totals[window.group] += loss
        tokens[window.group] += len(window.block.targets)
    parts = [
        {
            "source": group[0],
            "language": group[1],
            **figures(totals[group], totals[group], tokens[group], text.bytes[group]),
        }
        for group in totals
    ]
    total = sum(totals.values())
    return {**figures(total, total, sum(tokens.values()), sum(text.bytes.values())), "parts": parts}


def text_items(text: HeldOut, nats: Sequence[float]) -> PerItem:
    """The same window by window, for comparing two measurements; windows of one document belong together."""
    return per_text(
        [window.document for window in text.windows],
        [(loss, loss) for loss in nats],
        [len(window.block.targets) for window in text.windows],
        [window.size for window in text.windows],
        parts=[dict(zip(("source", "language"), window.group, strict=True)) for window in text.windows],
    )
