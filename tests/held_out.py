"""Held-out figures in one call, as the stages put them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.data.packing import Block, HeldOut
from medicalgpt_cli.engine.evaluation.bits_per_byte import text_figures, window_nats
from medicalgpt_cli.engine.evaluation.heldout import example_figures, example_nats


def held_out(
    model: torch.nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    collate: Callable[[Sequence[Example]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
) -> dict[str, Any]:
    """The figures of `sft` over every target token of `examples`, however they are batched."""
    nats = example_nats(model, examples, tokenizer, collate, batch_size=batch_size)
    return example_figures(examples, nats, tokenizer)


def text_loss(
    model: torch.nn.Module,
    text: HeldOut,
    collate: Callable[[Sequence[Block]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
) -> dict[str, Any]:
    """The figures of `pretrain` over every token of the held-out windows, however they are batched."""
    return text_figures(text, window_nats(model, text, collate, batch_size=batch_size))
