"""Base weights in 8 or 4 bits, through bitsandbytes; what learns lies over them in full precision.

4 bits: NormalFloat (nf4) with the scales quantised once more (Dettmers et al. 2023, QLoRA). 8 bits: LLM.int8()
(Dettmers et al. 2022). The output head, a reward model's head and the embeddings stay as they are.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from medicalgpt_cli.engine.model.references import ModelReference
from medicalgpt_cli.errors import EnvironmentFailure, UsageError

_PER_BYTE = 2  # 4-bit weights in a byte


def check_quantization(base: ModelReference, quantization: str | None) -> None:
    """Say what cannot be quantised before any weight is read.

    Raises:
        UsageError: the base's files are quantised already. EnvironmentFailure: bitsandbytes is missing.
    """
    if quantization is None:
        return
    flag = f"--load-in-{quantization}"
    if base.kind == "gguf":
        raise UsageError(
            f"{flag}: {base.name} is a GGUF file, whose weights are quantised in their own way",
            "name the model's safetensors version, or leave the option out",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFailure(f"{flag}: bitsandbytes is not installed", "pip install bitsandbytes")


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


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a processor.

    In evaluation mode it repacks them for a kernel of bfloat16 that has no gradient, and leaves them so: a model that
    was measured before it trains would learn from wrong gradients, without a word (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def count_parameters(model: torch.nn.Module) -> int:
    """Weights of a model, also where several of them share a byte."""
    return sum(
        weight.numel() * (_PER_BYTE * weight.element_size() if type(weight).__name__ == "Params4bit" else 1)
        for weight in model.parameters()
    )
