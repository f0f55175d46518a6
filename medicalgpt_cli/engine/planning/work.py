"""Floating-point operations of a run, and the time that they take.

An operation is an addition or a multiplication: a product of (a, b) and (b, c) matrices has 2abc of them. As usual only
products of matrices count (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, PaLM, appendix B).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from medicalgpt_cli.engine.model.experts import expert_weights, experts_a_token
from medicalgpt_cli.engine.model.parts import text_modules

_FORWARD, _ATTENTION_BACKWARD = 2, 2.5  # flash attention computes the scores anew: Dao 2023, section 4.1


@dataclass(frozen=True)
class Shape:
    """What a model's products are made of."""

    linear: (
        int  # weights without head and adapter that a token meets, of the experts only those it is sent to
    )
    learnt: int  # how many of these learn
    adapter: int
    head: int  # weights of the output head
    head_learns: bool
    attention: int  # heads · head size, of all layers


def shape_of(model: Any) -> Shape:
    """The shape of a model that need not have numbers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    linear = learnt = adapter = 0
    for name, module in text_modules(model):
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or module is head:
            continue
        if isinstance(module, torch.nn.Embedding) or hasattr(module, "base_layer"):  # PEFT's layer around one
            continue
        if ".lora_" in name:
            adapter += weight.numel()
        else:
            linear += weight.numel()
            learnt += weight.numel() if weight.requires_grad else 0
    config = inner.config.get_text_config()
    for weight in expert_weights(inner).values():
        met = weight[0].numel() * experts_a_token(config)
        linear += met
        learnt += met if weight.requires_grad else 0
    return Shape(
        linear,
        learnt,
        adapter,
        0 if head is None else head.weight.numel(),
        head is not None and head.weight.requires_grad,
        attention_width(config),
    )


# Kinds of layers (`layer_types`) in which no token looks at each of the others.
_WITHOUT_ATTENTION = ("linear_attention", "conv", "moe", "mlp")


def attention_width(config: Any) -> int:
    """Numbers that a pair of tokens is compared in, of all layers together: heads times their size.

    Layers may have settings of their own, and some have no attention. Where scores and values have heads of different
    sizes (multi-head latent attention, DeepSeek-V2 2024, section 2.1), their mean counts.

    Args:
        config: of the text model.
    """
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    layers = zip(kinds, config.per_layer_config, strict=True)
    return sum(_heads(layer) for kind, layer in layers if kind not in _WITHOUT_ATTENTION)


def _heads(layer: Any) -> int:
    """Heads times their size of one layer; 0 of a model without attention."""
    heads = getattr(layer, "num_attention_heads", None)
    if not heads:
        return 0
    if getattr(layer, "v_head_dim", None) and getattr(layer, "qk_rope_head_dim", None):
        scores = layer.qk_nope_head_dim + layer.qk_rope_head_dim
        return heads * (scores + layer.v_head_dim) // 2
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def forward(shape: Shape, tokens: int, pairs: int, projected: int) -> float:
    """Operations of a forward pass.

    Args:
        pairs: sum of the squared lengths of the rows; causal attention computes half of the two products of each pair.
        projected: positions whose logits are computed.
    """
    linear = _FORWARD * (shape.linear + shape.adapter) * tokens
    return linear + 2 * shape.attention * pairs + _FORWARD * shape.head * projected


def training(
    shape: Shape, tokens: int, pairs: int, projected: int, *, checkpointing: bool = False, learns: bool = True
) -> float:
    """Operations of a forward and a backward pass.

    A weight that learns costs a product for the activations' gradient and one for its own (6 operations a token with
    the forward pass); a frozen one only the first (4). A frozen output head computes its gradient beside the loss; one
    that learns computes its logits twice (`losses.py`). Checkpointing repeats the forward pass of the layers.
    """
    body = Shape(shape.linear, shape.learnt, shape.adapter, 0, False, shape.attention)
    ahead = forward(body, tokens, pairs, 0)
    back = 2 * (shape.linear + shape.learnt + 2 * shape.adapter) * tokens
    back += _ATTENTION_BACKWARD * 2 * shape.attention * pairs
    head = (8 if shape.head_learns else 4) * shape.head * projected
    return ahead * (2 if checkpointing else 1) + back + head


def speed_here(width: int, tokens: int, dtype: torch.dtype, device: Any, seconds: float = 2.0) -> float:
    """Operations a second of products as this model has them, measured for about `seconds`.

    A run is slower: it also reads data, adds, normalises and moves.
    """
    rows = min(max(tokens, 16), 4096)
    left = torch.randn(rows, width, dtype=dtype, device=device)
    right = torch.randn(width, 4 * width, dtype=dtype, device=device)
    done, began = 0, time.perf_counter()
    while True:
        left @ right
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - began
        if spent > seconds and done > 1:
            return done * 2 * rows * width * 4 * width / spent
