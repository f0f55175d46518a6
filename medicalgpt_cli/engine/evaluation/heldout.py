"""How well a model predicts held-out text: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.rendering import Example
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.batches import IGNORED, target_count
from medicalgpt_cli.engine.training.losses import target_loss


def target_bytes(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text that the targets spell; control tokens count as none."""
    total = 0
    for example in examples:
        spelled = [label for label in example.labels[1:] if label != IGNORED]
        total += len(tokenizer.decode(spelled, skip_special_tokens=True).encode("utf-8", "replace"))
    return total


@torch.no_grad()
def held_out(
    model: torch.nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    collate: Callable[[Sequence[Example]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean loss over every target token of `examples`, however they are batched.

    Returns:
        loss: nats a target token. perplexity: exp(loss).
        bits_per_byte: total loss in bits over the UTF-8 bytes of the target text; it stays comparable when
        the vocabulary changes. tokens, bytes: what was measured on. None where `should_stop` said so.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    task = "measuring held-out loss"
    if observer:
        observer.on_task_start(task, len(by_length), "examples")
    try:
        for start in range(0, len(by_length), batch_size):
            if should_stop():
                return None
            piece = by_length[start : start + batch_size]
            batch = {name: value.to(device) for name, value in collate(piece).items()}
            total += float(target_loss(model, batch))
            if observer:
                observer.on_task_advance(task, start + len(piece))
    finally:
        model.train(training)
        if observer:
            observer.on_task_end(task)
    tokens, size = target_count(examples), target_bytes(examples, tokenizer)
    loss = total / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / max(size, 1),
        "tokens": tokens,
        "bytes": size,
    }
