"""Rows of the embeddings for new tokens: each begins as the mean of the tokens that it takes the place of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def rows_needed(first_id: int, new_tokens: int, old_rows: int, multiple: int) -> int:
    """Rows of a widened embedding: room for every id, no fewer than before, and a multiple of `multiple`."""
    needed = max(first_id + new_tokens, old_rows)
    return -(-needed // multiple) * multiple


@torch.no_grad()
def widen(model: Any, made_of: Mapping[int, Sequence[int]], rows: int) -> None:
    """Give a model `rows` rows of input embeddings and of its output head, in place.

    A new token's row is the mean of its old tokens' rows, taken in fp32. A row behind the old ones that belongs
    to no token is the mean of all old rows: its logit is then the mean of all old logits, never the largest.
    All other rows stay as they are, also unused ones of the base.

    Args:
        made_of: new id: the base's ids of the same text.
    """
    old_rows = model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):  # resizing draws numbers for rows that are all set below
        model.resize_token_embeddings(rows, mean_resizing=False)
    tables = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not tables[0]:
        tables.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    for table in tables:  # (rows, width), or (rows,) of a bias
        average = _mean(table[:old_rows])
        table[old_rows:] = average
        for number, parts in made_of.items():
            table[number] = _mean(table[list(parts)]) if parts else average


def _mean(rows: torch.Tensor) -> torch.Tensor:
    return rows.mean(dim=0, dtype=torch.float32).to(rows.dtype)
