"""Base weights in 8 or 4 bits, through bitsandbytes; what learns lies over them in full precision.

4 bits: NormalFloat (nf4) with the scales quantised once more (Dettmers et al. 2023, QLoRA). 8 bits: LLM.int8()
(Dettmers et al. 2022). The output head, a reward model's head and the embeddings stay as they are.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

from medicalgpt_cli.engine.model.model_files import read_object
from medicalgpt_cli.engine.model.references import ModelReference, ResolvedModel
from medicalgpt_cli.engine.model.spread import size_of
from medicalgpt_cli.errors import EnvironmentFailure, UsageError

_PER_BYTE = 2  # 4-bit weights in a byte


def stored_quantization(base: ModelReference) -> str | None:
    """The method by which the files of a model folder are quantised already, such as "bitsandbytes" or "gptq"."""
    config = Path(base.path) / "config.json"
    if base.kind != "folder" or not config.is_file():
        return None
    stored = read_object(config).get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, dict):
        raise UsageError(f"{config}: quantization_config is no object", "was the copy complete?")
    return str(stored.get("quant_method", "an unknown method"))


def check_quantization(resolved: ResolvedModel, quantization: str | None, tuning: str = "lora") -> None:
    """Say what cannot be quantised before any weight is read.

    Raises:
        UsageError: the base's files are quantised already, or the adapter does not go over 8 bits.
        EnvironmentFailure: bitsandbytes is missing.
    """
    base = resolved.base
    stored = stored_quantization(base)
    if stored and tuning == "full":
        raise UsageError(
            f"{base.name} is a quantised model ({stored}), whose weights cannot be trained themselves",
            "leave out --tuning full: an adapter over them learns (QLoRA)",
        )
    if quantization is None:
        return
    flag = f"--load-in-{quantization}"
    if base.kind == "gguf":
        raise UsageError(
            f"{flag}: {base.name} is a GGUF file, whose weights are quantised in their own way",
            "name the model's safetensors version, or leave the option out",
        )
    if stored:
        raise UsageError(
            f"{flag}: the files of {base.name} are quantised already ({stored})",
            "leave the option out, or name the full-precision model",
        )
    if quantization == "8bit" and resolved.adapter is not None and _is_dora(resolved.adapter):
        raise UsageError(
            f"{flag}: {resolved.adapter.name} is a DoRA adapter, and the library computes those wrongly over 8 bits",
            "take --load-in-4bit",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFailure(f"{flag}: bitsandbytes is not installed", "pip install bitsandbytes")


def _is_dora(adapter: ModelReference) -> bool:
    config = Path(adapter.path) / "adapter_config.json"
    return bool(read_object(config).get("use_dora"))


def quantization_config(quantization: str, dtype: torch.dtype, kept: tuple[str, ...] = ()) -> Any:
    """The library's configuration.

    Args:
        quantization: "8bit" or "4bit".
        dtype: what is computed in.
        kept: layers that stay as they are, beside the output head.
    """
    from transformers import BitsAndBytesConfig

    skipped = {"llm_int8_skip_modules": list(kept)} if kept else {}
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        **skipped,
    )


def compute_alike(model: torch.nn.Module) -> None:
    """Make a quantised model compute the same on a processor whether it trains or answers, and in any batch.

    bitsandbytes 0.50 has kernels of its own there for evaluation mode. That for 4 bits repacks the weights, computes
    in bfloat16, has no gradient, and leaves them so: a model that was measured before it trains would learn from
    wrong gradients, without a word. That for 8 bits rounds the activations, too, by scales and outlier columns that
    depend on which other texts are in the batch. Its training kernels write the weights out and round nothing else.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        elif type(module).__name__ == "Linear8bitLt" and module.weight.device.type == "cpu":
            module.state.__class__ = _as_in_training()


@functools.cache
def _as_in_training() -> type:
    """The state of an 8-bit layer that always names training as what it is used for."""
    from bitsandbytes.autograd._functions import MatmulLtState

    class AsInTraining(MatmulLtState):
        is_training = property(lambda self: True, lambda self, value: None)

    return AsInTraining


def count_parameters(model: torch.nn.Module, *, learning: bool = False) -> int:
    """Weights of a model, also where several of them share a byte, or processes share them (ZeRO-3)."""
    return sum(
        size_of(weight) * (_PER_BYTE * weight.element_size() if type(weight).__name__ == "Params4bit" else 1)
        for weight in model.parameters()
        if weight.requires_grad or not learning
    )
