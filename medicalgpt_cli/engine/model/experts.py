"""Models that route each token to a few of many experts (mixture of experts).

transformers holds the experts of a layer as one parameter of three dimensions, (experts, rows, columns). Such a
parameter is no linear layer: bitsandbytes does not quantise it, and PEFT's LoRA over it takes no dropout and writes out
the changes to all experts for every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.modules.conv import _ConvNd

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def has_experts(config: Any) -> bool:
    """Whether a model of this configuration routes tokens to experts."""
    text = config.get_text_config()
    return any(_of_any_layer(text, name) > 1 for name in _COUNTS)


def _of_any_layer(text: Any, name: str) -> int:
    """A number of a configuration, the largest where layers have their own; 0 where it has none."""
    own = name in (text.per_layer_attributes or ())
    return max(getattr(layer, name, None) or 0 for layer in (text.per_layer_config if own else [text]))


def experts_a_token(config: Any) -> int:
    """How many experts see each token.

    Raises:
        NotImplementedError: the configuration names it in an unknown way.
    """
    text = config.get_text_config()
    for name in _CHOSEN:
        if found := _of_any_layer(text, name):
            return found
    raise NotImplementedError("experts a token")


def expert_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that hold experts, by name."""
    if not has_experts(model.config):
        return {}
    return {
        f"{place}.{name}": weight
        for place, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for name, weight in module.named_parameters(recurse=False)
        if len(getattr(weight, "ds_shape", weight.shape)) == 3  # ZeRO-3 holds a flat share
    }


def blocks_with_experts(model: Any) -> set[str]:
    """The parts of a layer in which experts lie: "mlp", say.

    Such a block has the same name in every layer, also in layers without experts.
    """
    return {block for name in expert_weights(model) if (block := block_of(name)) is not None}


def block_of(name: str) -> str | None:
    """The part of a layer that something lies in: "mlp" of model.layers.3.mlp.experts; None outside of layers."""
    path = _block_path(name)
    return None if path is None else path.rpartition(".")[2]


def beside_experts(model: Any, layers: Sequence[str]) -> list[str]:
    """Those of `layers` that lie in no block of their layer with experts.

    Looked at layer by layer: Nemotron-H calls attention, state and experts "mixer", each in layers of its own.
    """
    blocks = {prefix for name in expert_weights(model) if (prefix := _block_path(name)) is not None}
    return [name for name in layers if _block_path(name) not in blocks | {None}]


def _block_path(name: str) -> str | None:
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: places[0] + 2]) if places and places[0] + 1 < len(parts) else None
