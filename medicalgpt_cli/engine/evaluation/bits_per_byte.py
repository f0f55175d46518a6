"""How well a model predicts plain text, by source and language."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from medicalgpt_cli.engine.data.packing import Block, HeldOut
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.losses import target_loss


@torch.no_grad()
def text_loss(
    model: torch.nn.Module,
    text: HeldOut,
    collate: Callable[[Sequence[Block]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Loss over every token of the held-out windows, however they are batched.

    Returns:
        loss: nats a token. perplexity: exp(loss).
        bits_per_byte: total loss in bits over the UTF-8 bytes of the text; every byte of a measured document
        is counted, so that it stays comparable when the vocabulary changes.
        tokens, bytes: what was measured on.
        parts: the same by source and language. None where `should_stop` said so.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    totals = dict.fromkeys(text.bytes, 0.0)
    tokens = dict.fromkeys(text.bytes, 0)
    task = "measuring held-out text"
    done = 0
    if observer:
        observer.on_task_start(task, len(text.windows), "blocks")
    try:
        for group in totals:
            blocks = [window.block for window in text.windows if window.group == group]
            tokens[group] = sum(len(block.targets) for block in blocks)
            blocks.sort(key=lambda block: len(block.input_ids))
            for start in range(0, len(blocks), batch_size):
                if should_stop():
                    return None
                piece = blocks[start : start + batch_size]
                batch = {name: value.to(device) for name, value in collate(piece).items()}
                totals[group] += float(target_loss(model, batch))
                done += len(piece)
                if observer:
                    observer.on_task_advance(task, done)
    finally:
        model.train(training)
        if observer:
            observer.on_task_end(task)
    parts = [
        {
            "source": group[0],
            "language": group[1],
            **_figures(totals[group], tokens[group], text.bytes[group]),
        }
        for group in totals
    ]
    whole = _figures(sum(totals.values()), sum(tokens.values()), sum(text.bytes.values()))
    return {**whole, "parts": parts}


def _figures(total: float, tokens: int, size: int) -> dict[str, Any]:
    loss = total / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / max(size, 1),
        "tokens": tokens,
        "bytes": size,
    }
