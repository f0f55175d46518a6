"""Merging an adapter into its base layer by layer, each compared with the sum worked out in float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from medicalgpt_cli.errors import MedgptError, UsageError

_PIECE = 2**22  # numbers of a weight that are compared at one time: 32 MiB in float64
_ROUNDING = 2.0**-23


def adapted_layers(model: Any) -> list[tuple[str, Any]]:
    """The layers of a PeftModel that LoRA changes, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    return [
        (name, module)
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    ]


def fold(model: Any) -> tuple[Any, int]:
    """The base of a PeftModel with the adapter's changes in its weights.

    What is no LoRA (tables that were trained as a whole, other kinds of adapters) is left to PEFT.

    Returns:
        The model, and how many layers' weights were compared with W + scaling · BA. LoRA over a bare parameter
        (experts) is merged and not compared.

    Raises:
        UsageError: layers that share one weight are changed differently, or the changes are not finite.
        MedgptError: what PEFT made of a weight is not the sum.
    """
    refuse_shared_weights(model)
    compared = 0
    try:
        for name, layer in adapted_layers(model):
            compared += _merge(name, layer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return model.merge_and_unload(safe_merge=True), compared
    except ValueError:  # PEFT's word for weights that are not finite
        raise UsageError(
            "the adapter holds numbers that are not finite", "its training went wrong; take an earlier one"
        ) from None


def _merge(name: str, layer: Any) -> bool:
    """Merge one layer; whether its weight was compared."""
    base, adapter = layer.get_base_layer(), layer.active_adapters[0]
    plain = layer.lora_variant.get(adapter) is None
    is_known = isinstance(base, torch.nn.Embedding) and plain
    if isinstance(base, torch.nn.Linear | Conv1D):
        is_known = plain or adapter in layer.lora_magnitude_vector
    if not is_known or len(layer.active_adapters) > 1:
        layer.merge(safe_merge=True)
        return False
    before = base.weight.detach().clone()
    layer.merge(safe_merge=True)
    _must_be_the_sum(name, layer, before, base.weight.detach())
    return True


def refuse_shared_weights(model: Any) -> None:
    """Refuse an adapter that changes a weight in one of the places where it stands, or differently in several.

    Zamba2's attention blocks lie in several layers and share their weights, and PEFT gives each an adapter of its own;
    an output head shares the table of embeddings. One weight cannot be what each of them says.

    Raises:
        UsageError: there is such a weight.
    """
    base = model.get_base_model()
    adapted = {id(layer.get_base_layer()): name for name, layer in adapted_layers(model)}
    places: dict[int, list[tuple[str, bool]]] = {}
    for name, module in base.named_modules():  # names each module once
        for own, weight in module.named_parameters(recurse=False):
            changed = adapted.get(id(module))
            if weight.numel():
                place = (changed or f"{name}.{own}", changed is not None)
                places.setdefault(weight.data_ptr(), []).append(place)
    for found in places.values():
        if len(found) > 1 and any(changed for _, changed in found):
            names = sorted(name for name, _ in found)
            raise UsageError(
                f"{names[0]} and {names[1]} share one weight, which the adapter changes in each place by itself: "
                "no merged weight is both",
                "use the adapter as it is, with --lora-model",
            )


def _must_be_the_sum(name: str, layer: Any, before: torch.Tensor, after: torch.Tensor) -> None:
    """
    Raises:
        MedgptError: a merged weight differs from W + scaling · BA by more than fp32 rounds.
    """
    if isinstance(layer.get_base_layer(), Conv1D):  # which holds its weight as (in, out)
        before, after = before.T, after.T
    for rows, expected, allowed in _sums(layer, before):
        found = after[rows].double()
        if not bool(((found - expected).abs() <= allowed).all()):  # also refuses NaN
            raise MedgptError(
                f"the merged weight of {name} is not the sum of base and adapter",
                "nothing was written; please report this with the adapter's adapter_config.json",
            )


def _sums(layer: Any, before: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """A merged weight worked out in float64, some rows at a time.

    LoRA (Hu et al. 2021, section 4.1): W + scaling · BA. DoRA (Liu et al. 2024, equation 5): that, each row brought to
    the length m. A sum of r products is off by up to r roundings of their sizes, the length of a row by some more.

    Args:
        before: (out, in), or (rows, width) of an embedding.

    Yields:
        Which rows; what they are; how far fp32 may be from each number.
    """
    adapter = layer.active_adapters[0]
    if adapter in layer.lora_A:
        left, right = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    else:  # of an embedding
        left, right = layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter].T
    left, right, scaling = left.detach().double(), right.detach().double(), layer.scaling[adapter]
    length = None
    if adapter in layer.lora_magnitude_vector:
        length = layer.lora_magnitude_vector[adapter].weight.detach().double().flatten()
    step = max(_PIECE // before.shape[1], 1)
    for start in range(0, len(before), step):
        rows = slice(start, start + step)
        weight = before[rows].double()
        merged = weight + scaling * left[rows] @ right
        sizes = weight.abs() + abs(scaling) * left[rows].abs() @ right.abs()
        allowed = _ROUNDING * (right.shape[0] + 4) * sizes
        if length is not None:
            factor = (length[rows] / merged.norm(dim=1))[:, None]
            merged = factor * merged
            allowed = factor.abs() * allowed + _ROUNDING * before.shape[1] ** 0.5 * merged.abs()
        yield rows, merged, allowed
