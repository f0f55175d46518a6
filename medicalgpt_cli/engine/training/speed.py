"""Faster kernels on demand: FlashAttention, Liger, 8-bit floats, compiled layers. docs/speed.md is the guide.

The only place that knows the names of these packages. What cannot work is refused, with the reason, before any weight
is read; nothing is taken unasked, and nothing that was asked for is left out silently.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from medicalgpt_cli.engine.model.loading import choose_device, choose_dtype, read_config
from medicalgpt_cli.engine.model.quantization import stored_quantization
from medicalgpt_cli.engine.model.references import ResolvedModel
from medicalgpt_cli.engine.training import attention, sharding
from medicalgpt_cli.errors import EnvironmentFailure, UsageError
from medicalgpt_cli.settings.groups import SpeedSettings
from medicalgpt_cli.settings.stages import TrainSettings


@dataclass(frozen=True)
class _Flash:
    """A generation of FlashAttention: its name in the library, its package, and the GPUs that it was written for."""

    implementation: str
    package: str
    capability: tuple[int, int]
    widest_head: int = 256


_FLASH = {
    "flash2": _Flash("flash_attention_2", "flash-attn", (8, 0)),  # Ampere and newer
    "flash3": _Flash("flash_attention_3", "flash-attn-3", (9, 0)),  # Hopper
}
_FP8 = (8, 9)  # Ada and Hopper are the first with tensor cores for 8-bit floats


def check(settings: TrainSettings, resolved: ResolvedModel) -> None:
    """See that what was asked for can work here, with this model.

    Raises:
        UsageError: it cannot. EnvironmentFailure: the device or a package is not there.
    """
    choose_dtype(settings, choose_device(settings))  # refuses bf16 where it is not native
    if not isinstance(settings, SpeedSettings):
        return
    if settings.attention in _FLASH:
        _check_flash(settings, resolved)
    if settings.liger:
        _check_liger(settings, resolved)
    if settings.fp8:
        _check_fp8(settings)
    if settings.compile:
        _check_compile(settings, resolved)


def prepare(model: Any, settings: TrainSettings) -> None:
    """Put the kernels that were asked for into a model that was loaded to be trained."""
    if not isinstance(settings, SpeedSettings):
        return
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if settings.attention != "auto":
        flash = _FLASH.get(settings.attention)
        compute = choose_dtype(settings, choose_device(settings))
        attention.choose(model, flash.implementation if flash else settings.attention, compute)
    if settings.liger:
        _liger().apply(inner)
    if settings.fp8:
        use_fp8(inner)


@contextmanager
def compiled(model: Any, settings: TrainSettings) -> Iterator[None]:
    """Inside, the layers of `model` are compiled where `--compile` asked for it; its weights keep their names.

    Layers, not the whole model: they share one compiled form, and what is around them (targets, the loss in pieces)
    stays as it is. Answers are made outside: each of their steps has another shape.
    """
    layers = _layers(model) if isinstance(settings, SpeedSettings) and settings.compile else []
    for layer in layers:
        # An entry of the instance, in front of the class's method. Batches differ in length: dynamic.
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _layers(model: Any) -> list[torch.nn.Module]:
    """The repeated blocks of a model, such as LlamaDecoderLayer."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(inner._no_split_modules or [])
    return [module for module in inner.modules() if type(module).__name__ in names]


# -- what each needs ---------------------------------------------------------------------------------------


def _capability(settings: TrainSettings, flag: str, least: tuple[int, int]) -> None:
    """
    Raises:
        EnvironmentFailure: there is no GPU, or an older one.
    """
    device = choose_device(settings)
    if device.type != "cuda":
        raise EnvironmentFailure(f"{flag} needs a GPU, and this run has none", f"leave {flag} out")
    found = torch.cuda.get_device_capability(device)
    if found < least:
        raise EnvironmentFailure(
            f"{flag} needs a GPU of compute capability {least[0]}.{least[1]} or newer; "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}",
            f"leave {flag} out",
        )


def _check_flash(settings: TrainSettings, resolved: ResolvedModel) -> None:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    flag, flash = f"--attention {settings.attention}", _FLASH[settings.attention]
    if settings.dtype == "fp32":
        raise UsageError(f"{flag} computes in bf16 or fp16, not in fp32", "leave out --dtype fp32")
    _capability(settings, flag, flash.capability)
    there = is_flash_attn_2_available if settings.attention == "flash2" else is_flash_attn_3_available
    if not there():
        raise EnvironmentFailure(
            f"{flag}: {flash.package} is not installed, or too old",
            f"pip install {flash.package} (it is built for one version of torch), or leave it out",
        )
    config = read_config(resolved)
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None or not kind._supports_flash_attn:
        raise UsageError(f"{flag}: models of type {config.model_type} do not go with it", "leave it out")
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if width > flash.widest_head:
        raise UsageError(
            f"{flag} takes heads of up to {flash.widest_head} numbers; this model's have {width}",
            "leave it out",
        )


def _check_liger(settings: TrainSettings, resolved: ResolvedModel) -> None:
    _capability(settings, "--liger", (7, 0))  # Triton's
    if importlib.util.find_spec("liger_kernel") is None:
        raise EnvironmentFailure(
            "--liger: liger-kernel is not installed", "pip install 'medicalgpt-cli[fast]', or leave it out"
        )
    kind = read_config(resolved).model_type
    if kind not in _liger().types:
        raise UsageError(f"--liger has no kernels for models of type {kind}", "leave it out")


@dataclass(frozen=True)
class _Liger:
    types: frozenset[str]
    apply: Callable[[Any], None]


def _liger() -> _Liger:
    """Which models Liger knows, and how it takes one."""
    from liger_kernel.transformers import monkey_patch

    def apply(model: Any) -> None:
        # Our loss never makes all logits, so that its cross entropy has nothing to save.
        monkey_patch._apply_liger_kernel_to_instance(
            model=model, cross_entropy=False, fused_linear_cross_entropy=False
        )

    return _Liger(frozenset(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN), apply)


def _check_fp8(settings: TrainSettings) -> None:
    if settings.tuning == "lora":
        raise UsageError(
            "--fp8 is for --tuning full: the products of an adapter are too small to gain",
            "leave it out, or add --tuning full",
        )
    if settings.dtype in ("fp32", "fp16"):
        raise UsageError("--fp8 goes with bf16", f"leave out --dtype {settings.dtype}")
    _only_ddp(settings, "--fp8")
    _capability(settings, "--fp8", _FP8)
    if importlib.util.find_spec("torchao") is None:
        raise EnvironmentFailure("--fp8: torchao is not installed", "pip install torchao, or leave it out")


def use_fp8(model: Any, *, emulate: bool = False) -> int:
    """Let the linear layers of `model` multiply in 8-bit floats, forwards and backwards; their weights stay.

    Each tensor is scaled by its largest value as it is used (Micikevicius et al. 2022). The output head stays as it
    is, and so does a layer whose sides are no multiples of 16, which the kernels want.

    Args:
        emulate: compute the same slowly, on any device.

    Returns:
        How many layers were changed.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    heads = (model.get_output_embeddings(), getattr(model, "score", None))

    def fits(module: torch.nn.Module, _: str) -> bool:
        return module not in heads and module.in_features % 16 == 0 and module.out_features % 16 == 0

    # Batches have any number of tokens, which are padded to a multiple of 16 for the weights' gradient.
    options = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, module_filter_fn=fits, config=options)
    return sum(isinstance(module, Float8Linear) for module in model.modules())


def _check_compile(settings: TrainSettings, resolved: ResolvedModel) -> None:
    if settings.quantization or stored_quantization(resolved.base):
        bits = f"--load-in-{settings.quantization}" if settings.quantization else "a quantised model"
        raise UsageError(f"--compile does not go with {bits}", "leave one of them out")
    if settings.gradient_checkpointing:
        raise UsageError(
            "--compile does not go with --gradient-checkpointing: what is recomputed is not compiled",
            "leave one of them out",
        )
    _only_ddp(settings, "--compile")
    if choose_device(settings).type == "cpu":
        if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            raise EnvironmentFailure(
                "--compile needs a C++ compiler on a processor", "install g++, or leave it out"
            )
    elif importlib.util.find_spec("triton") is None:
        raise EnvironmentFailure("--compile needs triton on a GPU", "pip install triton, or leave it out")


def _only_ddp(settings: TrainSettings, flag: str) -> None:
    if (kind := sharding.kind_of(settings)) != "ddp":
        raise UsageError(f"{flag} does not go with --parallel {kind}", "leave one of them out")
