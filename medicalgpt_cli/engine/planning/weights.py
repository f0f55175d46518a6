"""Do the weights of a model fit that only answers or scores? A model that learns has a whole plan (`start.py`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from medicalgpt_cli.engine.model.experts import has_experts
from medicalgpt_cli.engine.model.loading import choose_device, choose_dtype, gpus_of_the_model
from medicalgpt_cli.engine.model.references import ResolvedModel
from medicalgpt_cli.engine.planning.device import device_memory, program_bytes
from medicalgpt_cli.engine.planning.skeleton import Kind, Outline, build, count, outline
from medicalgpt_cli.errors import EnvironmentFailure
from medicalgpt_cli.settings.groups import DeviceSettings


def must_fit(
    settings: DeviceSettings, resolved: ResolvedModel, *, force: bool, kind: Kind = "language"
) -> None:
    """Stop before weights are loaded that cannot fit: a killed process says nothing.

    What is wrong with the model itself, loading it says.

    Raises:
        EnvironmentFailure: less memory is free than the weights need, and not `force`.
    """
    if force:
        return
    device = choose_device(settings)
    on_gpu, dtype = device.type == "cuda", choose_dtype(settings, device)
    gpus = gpus_of_the_model(settings) if kind == "language" else 1
    have = device_memory(settings, on_gpu, gpus)
    assert have is not None  # the device is here
    room = have - program_bytes(on_gpu)
    try:
        shapes = outline(resolved, dtype, kind=kind, quantization=settings.quantization)
        need = _bytes(shapes)
    except Exception:  # of any kind, since a configuration can be wrong in any way
        return
    if need <= room:
        return
    can_quantise = resolved.base.kind != "gguf" and not has_experts(shapes.config)
    raise EnvironmentFailure(
        f"the weights of {resolved.label} need {need / 2**30:.1f} GiB of memory, and {room / 2**30:.1f} GiB are free",
        f"{option_that_fits(shapes, room, can_quantise) or 'take a smaller model'}; --force goes on",
    )


def _bytes(shapes: Outline) -> int:
    weights = count(build(shapes))
    return weights.base_bytes + weights.adapter_bytes


def option_that_fits(shapes: Outline, room: int, can_quantise: bool) -> str | None:
    """The first option with which the weights fit into `room` bytes."""
    if shapes.quantization is not None:
        return None
    options = {"--dtype bf16": replace(shapes, dtype=torch.bfloat16)}
    if can_quantise:
        options["--load-in-8bit"] = replace(shapes, quantization="8bit")
        options["--load-in-4bit"] = replace(shapes, quantization="4bit")
    return next((option for option, smaller in options.items() if _bytes(smaller) <= room), None)
