"""How well a model predicts held-out text: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.evaluation.batched import by_length, in_batches, never
from medicalgpt_cli.engine.evaluation.paired import PerItem, per_text
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.batches import IGNORED, target_count
from medicalgpt_cli.engine.training.losses import target_nats


def targets_of(example: Example) -> list[int]:
    """The tokens that a loss falls on. The first token of an example is never predicted."""
    return [label for label in example.labels[1:] if label != IGNORED]


def target_bytes(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text that the targets spell; control tokens have none."""
    return len(tokenizer.decode(targets_of(example), skip_special_tokens=True).encode("utf-8", "replace"))


def example_figures(
    examples: Sequence[Example], nats: Sequence[tuple[float, float]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The `figures` of all examples."""
    size = sum(target_bytes(example, tokenizer) for example in examples)
    whole, text = math.fsum(one for one, _ in nats), math.fsum(one for _, one in nats)
    return figures(whole, text, target_count(examples), size)


def example_items(
    examples: Sequence[Example],
    groups: Sequence[Any],
    nats: Sequence[tuple[float, float]],
    tokenizer: PreTrainedTokenizerBase,
) -> PerItem:
    """The same example by example, for comparing two measurements.

    Args:
        groups: the question of each example: answers to one question, or turns of one conversation, belong together.
    """
    tokens = [target_count([example]) for example in examples]
    return per_text(groups, nats, tokens, [target_bytes(example, tokenizer) for example in examples])


def example_nats(
    model: torch.nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    collate: Callable[[Sequence[Example]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = never,
) -> list[tuple[float, float]] | None:
    """The nats of each example: over all its targets, and over those that spell text (no control tokens).

    None where `should_stop` said so.
    """
    batches = by_length([len(example.input_ids) for example in examples], batch_size)
    found = in_batches(
        model,
        examples,
        batches,
        collate,
        lambda batch: target_nats(model, batch).tolist(),
        task="measuring held-out loss",
        unit="examples",
        observer=observer,
        should_stop=should_stop,
    )
    if found is None:
        return None
    control = frozenset(tokenizer.all_special_ids)
    nats = [(0.0, 0.0)] * len(examples)
    for batch, of_batch in zip(batches, found, strict=True):
        targets = [targets_of(examples[index]) for index in batch]
        for index, tokens, values in zip(batch, targets, apart(of_batch, map(len, targets)), strict=True):
            text = (value for token, value in zip(tokens, values, strict=True) if token not in control)
            nats[index] = math.fsum(values), math.fsum(text)
    return nats


def apart(values: Sequence[float], lengths: Iterable[int]) -> list[Sequence[float]]:
    """Values that stand behind one another, cut into pieces of the given lengths."""
    bounds = [0, *accumulate(lengths)]
    if bounds[-1] != len(values):
        raise ValueError(f"{len(values)} values for {bounds[-1]} targets")
    return [values[a:b] for a, b in pairwise(bounds)]


def figures(total: float, text: float, tokens: int, size: int) -> dict[str, Any]:
    """What a summed loss says.

    Args:
        total: nats over all targets. text: nats over those that spell text: end-of-turn and other control tokens have
            no bytes, so what they cost is no part of bits per byte. size: UTF-8 bytes that the text has.

    Returns:
        loss: nats a target token. perplexity: exp(loss).
        bits_per_byte: loss of the text in bits over its bytes; it stays comparable when the vocabulary changes.
        tokens, bytes: what was measured on.
    """
    loss = total / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": text / math.log(2) / max(size, 1),
        "tokens": tokens,
        "bytes": size,
    }
