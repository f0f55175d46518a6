"""How well a model predicts held-out text: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.rendering import Example
from medicalgpt_cli.engine.evaluation.batched import by_length, in_batches, never
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


def held_out(
    model: torch.nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    collate: Callable[[Sequence[Example]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = never,
) -> dict[str, Any] | None:
    """Mean loss over every target token of `examples`, however they are batched.

    Returns:
        The `figures` of all targets. None where `should_stop` said so.
    """
    losses = in_batches(
        model,
        examples,
        by_length([len(example.input_ids) for example in examples], batch_size),
        collate,
        lambda batch: float(target_loss(model, batch)),
        task="measuring held-out loss",
        unit="examples",
        observer=observer,
        should_stop=should_stop,
    )
    if losses is None:
        return None
    return figures(sum(losses), target_count(examples), target_bytes(examples, tokenizer))


def figures(total: float, tokens: int, size: int) -> dict[str, Any]:
    """What a summed loss says.

    Args:
        total: nats over all targets. size: UTF-8 bytes of the text that the targets spell.

    Returns:
        loss: nats a target token. perplexity: exp(loss).
        bits_per_byte: total loss in bits over the bytes; it stays comparable when the vocabulary changes.
        tokens, bytes: what was measured on.
    """
    loss = total / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / max(size, 1),
        "tokens": tokens,
        "bytes": size,
    }
