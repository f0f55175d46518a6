"""The loss of next-token prediction, computed at target positions only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from medicalgpt_cli.engine.training.batches import IGNORED


def target_loss(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum of -log p(target) over the target positions of a batch, in nats; a scalar with gradient.

    Prompt positions are never projected to the vocabulary: on a 50,000-word vocabulary that projection
    is a third of a small model's work, and its result would be thrown away.

    Args:
        batch: input_ids and shift_labels, (rows, length), and what else the model's forward takes.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    labels = batch["shift_labels"]
    is_target = labels != IGNORED
    columns = is_target.any(dim=0).nonzero().squeeze(1)  # (kept,) the same columns for each row
    if _takes_positions(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns]
    keep = is_target[:, columns]  # (rows, kept)
    return F.cross_entropy(logits[keep].float(), labels[:, columns][keep], reduction="sum")


def _takes_positions(model: torch.nn.Module) -> bool:
    inner: Any = model.module if hasattr(model, "module") else model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
