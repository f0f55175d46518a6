"""Rotary positions with two sets of factors (LongRoPE, Ding et al. 2024: Phi-3.5, Phi-4-mini, MiniCPM3).

A text that is longer than the original context gets the long factors, from its first token on. The library decides
so for a whole batch, by its largest position: one long text would change what all others mean. Here each text has
the factors that it would have alone, padded or laid end to end, read at once or in pieces.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


class _ByText:
    """A rotary embedding of the library's that chooses its factors text by text."""

    text_lengths: torch.Tensor | None = (
        None  # of the pass that is computed; shaped to broadcast over positions
    )

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **named: Any) -> Any:
        """cos and sin, each (rows, length, size).

        Args:
            position_ids: (rows, length), or (1, length) where all rows have the same.
        """
        switch = _switch(self, *args, **named)
        compute = super().forward  # type: ignore[misc]
        if switch is None:
            return compute(x, position_ids, *args, **named)
        lengths = self.text_lengths
        if lengths is None:
            lengths = position_ids.amax(-1, keepdim=True) + 1
        is_long = (lengths > switch).to(position_ids.device)
        rows = max(len(is_long), len(position_ids))
        positions, is_long = position_ids.expand(rows, -1), is_long.expand(rows, position_ids.shape[-1])
        if not is_long.any():
            return compute(x, positions.clamp(max=switch - 1), *args, **named)  # padding may lie beyond
        # The library decides by the largest position: one more column makes it that of a long text.
        beyond = torch.cat([positions, positions.new_full((rows, 1), switch)], dim=-1)
        long = [one[:, :-1] for one in compute(x, beyond, *args, **named)]
        if is_long.all():
            return tuple(long)
        short = compute(x, positions.masked_fill(is_long, 0).clamp(max=switch - 1), *args, **named)
        return tuple(torch.where(is_long[..., None], a, b) for a, b in zip(long, short, strict=True))


@functools.cache
def _by_text(kind: type) -> type:
    return type(f"{kind.__name__}ByText", (_ByText, kind), {})


def _switch(rotary: Any, layer_type: str | None = None) -> int | None:
    """The length beyond which a rotary embedding takes its long factors; None where it has one set."""
    kind, parameters = rotary.rope_type, rotary.config.rope_parameters
    if layer_type is not None:
        kind, parameters = kind[layer_type], parameters[layer_type]
    return int(parameters["original_max_position_embeddings"]) if kind == "longrope" else None


def _rotaries(model: torch.nn.Module) -> list[tuple[torch.nn.Module, Any]]:
    """(the module that holds it, a rotary embedding with two sets of factors)."""
    return [
        (holder, child)
        for holder in model.modules()
        for child in holder.children()
        if "longrope" in _kinds(child)
    ]


def _kinds(module: Any) -> list[str]:
    kind = getattr(module, "rope_type", None)
    return list(kind.values()) if isinstance(kind, dict) else [kind]


def switches(model: Any) -> frozenset[int]:
    """The lengths beyond which a text's positions mean something else; empty for most models.

    Of a model that chooses by text (`choose_by_text`); looked for once.
    """
    if "_medgpt_switches" not in vars(model):
        found: set[int | None] = set()
        for rotary in model.modules():
            if isinstance(rotary, _ByText):
                layers = rotary.rope_type if isinstance(rotary.rope_type, dict) else [None]
                found |= {_switch(rotary, layer) for layer in layers}
        model._medgpt_switches = frozenset(one for one in found if one is not None)
    return model._medgpt_switches


def choose_by_text(model: torch.nn.Module) -> torch.nn.Module:
    """Let a model with two sets of factors choose them text by text; others stay as they are."""
    for holder, rotary in _rotaries(model):
        if isinstance(rotary, _ByText):
            continue
        rotary.__class__ = _by_text(type(rotary))
        holder.register_forward_pre_hook(functools.partial(_tell, rotary), with_kwargs=True)
    return model


def _tell(rotary: Any, _: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Tell a rotary embedding how long the texts of this pass are.

    `text_lengths`, (rows, 1), says so where a pass holds but a piece of them; else it is what the mask covers, or
    what lies between two bounds. Without any of them the positions say it.
    """
    named = dict(named)
    lengths = named.pop("text_lengths", None)
    mask, bounds = named.get("attention_mask"), named.get("cu_seq_lens_q")
    if lengths is None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
        lengths = mask.sum(-1, keepdim=True)
    elif lengths is None and bounds is not None:
        sizes = bounds.diff()
        lengths = sizes.repeat_interleave(sizes)[None]
    rotary.text_lengths = lengths
    return given, named
