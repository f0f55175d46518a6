"""Do the weights of a model fit that only answers or scores? A model that learns has a whole plan (`start.py`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from medicalgpt_cli.engine.model.experts import has_experts
from medicalgpt_cli.engine.model.loading import choose_device, choose_dtype
from medicalgpt_cli.engine.model.references import ResolvedModel
from medicalgpt_cli.engine.planning.device import device_memory, program_bytes
from medicalgpt_cli.engine.planning.skeleton import Kind, Outline, build, count, outline
from medicalgpt_cli.errors import EnvironmentFailure, MedgptError
from medicalgpt_cli.settings.groups import DeviceSettings

# What a model raises that does something which depends on numbers, or has a configuration of its own kind.
UNKNOWN = (NotImplementedError, ValueError, AttributeError, LookupError, TypeError)


def must_fit(
    settings: DeviceSettings, resolved: ResolvedModel, *, force: bool, kind: Kind = "language"
) -> None:
    """Stop before weights are loaded that cannot fit: a killed process says nothing.

    What is wrong with the model itself, loading it says.

    Raises:
        EnvironmentFailure: the device has less memory than the weights need, and not `force`.
    """
    if force:
        return
    device = choose_device(settings)
    on_gpu, dtype = device.type == "cuda", choose_dtype(settings, device)
    have = device_memory(settings, on_gpu)
    try:
        shapes = outline(resolved, dtype, kind=kind, quantization=settings.quantization)
        need = program_bytes(on_gpu) + _bytes(shapes)
    except (*UNKNOWN, MedgptError):
        return
    if have is None or need <= have:
        return
    room = have - program_bytes(on_gpu)
    can_quantise = resolved.base.kind != "gguf" and not has_experts(shapes.config)
    raise EnvironmentFailure(
        f"the weights of {resolved.label} need {need / 2**30:.1f} GiB of memory, and {have / 2**30:.1f} GiB are there",
        f"{_smaller(shapes, room, can_quantise)}; --force goes on",
    )


def _bytes(shapes: Outline) -> int:
    weights = count(build(shapes))
    return weights.base_bytes + weights.adapter_bytes


def _smaller(shapes: Outline, room: int, can_quantise: bool) -> str:
    """The first option with which the weights fit into `room` bytes."""
    if shapes.quantization is None:
        options = {"--dtype bf16": replace(shapes, dtype=torch.bfloat16)}
        if can_quantise:
            options["--load-in-8bit"] = replace(shapes, quantization="8bit")
            options["--load-in-4bit"] = replace(shapes, quantization="4bit")
        for option, smaller in options.items():
            if _bytes(smaller) <= room:
                return option
    return "take a smaller model"
