"""Layers that hold and keep what bitsandbytes' layers do, for a model without numbers.

What they keep for the backward pass was read from bitsandbytes 0.50: `MatMul4Bit` keeps nothing but the packed weights,
`MatMul8bitFp` (processors) and `MatMul8bitLt` (GPUs) keep their input. The weights of the layer at hand are written out
in full for a product.
"""

from __future__ import annotations

from typing import Any

import torch

from medicalgpt_cli.engine.model.score_head import HEAD


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out_features: int, keeps: bool) -> torch.Tensor:
        ctx.shape = (out_features, x.shape[-1])
        if keeps:
            ctx.save_for_backward(x)
        return torch.nn.functional.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


class QuantisedLinear(torch.nn.Linear):
    """A linear layer whose weights are held in 8 or 4 bits; the content of `weight` stands for them."""

    def __init__(self, like: torch.nn.Linear, bits: str):
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        self.bits = bits
        self.weight = torch.nn.Parameter(torch.empty_like(like.weight, dtype=torch.int8), requires_grad=False)
        self.bias = like.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = _Product.apply(x, self.out_features, self.bits == "8bit")
        return found if self.bias is None else found + self.bias


def quantise(model: Any, bits: str) -> None:
    """Put stand-ins in the place of the layers that bitsandbytes quantises: all linear ones but the heads."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        place, _, own = name.rpartition(".")
        if type(module) is torch.nn.Linear and module is not head and own != HEAD:
            setattr(model.get_submodule(place), own, QuantisedLinear(module, bits))
