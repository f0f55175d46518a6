"""Dropout for processors: the library's draws one random number an element, and that is most of LoRA's cost.

`tests/benchmarks/dropout_speed.py` compares the two.
"""

from __future__ import annotations

from typing import Any

import torch

_STEPS = 2**16  # the probability is rounded to a multiple of 1/65,536


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probability: float) -> torch.Tensor:
        size = x.numel()
        # One 64-bit draw of the ordinary generator decides about four elements.
        drawn = torch.empty(-(-size // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        dropped = round(probability * _STEPS)
        keep = drawn.view(torch.int16)[:size].view(x.shape) >= dropped - _STEPS // 2
        ctx.save_for_backward(keep)
        ctx.scale = _STEPS / (_STEPS - dropped)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (gradient * keep).mul_(ctx.scale), None


class FastDropout(torch.nn.Module):
    """Like torch.nn.Dropout for tensors on a processor: zero with `p`, else scaled by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Drop.apply(x, self.p) if self.training and self.p > 0 else x


def use_fast_dropout(model: torch.nn.Module) -> None:
    """Put it in the place of the dropout in front of every LoRA adapter of a model on a processor."""
    for module in model.modules():
        layers = getattr(module, "lora_dropout", None)
        if not isinstance(layers, torch.nn.ModuleDict):
            continue
        for name, layer in layers.items():
            if type(layer) is torch.nn.Dropout:
                layers[name] = FastDropout(layer.p).train(layer.training)
