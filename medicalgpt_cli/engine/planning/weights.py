"""Do the weights of a model fit that only answers or scores? A model that learns has a whole plan (`start.py`)."""

from __future__ import annotations

from medicalgpt_cli.engine.model.loading import choose_device, choose_dtype
from medicalgpt_cli.engine.model.references import ResolvedModel
from medicalgpt_cli.engine.planning.device import device_memory, program_bytes
from medicalgpt_cli.engine.planning.skeleton import Kind, build, count, outline
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
        weights = count(build(shapes))
    except (*UNKNOWN, MedgptError):
        return
    need = program_bytes(on_gpu) + weights.base_bytes + weights.adapter_bytes
    if have is None or need <= have:
        return
    smaller = "--load-in-4bit, or a smaller model" if shapes.quantization is None else "take a smaller model"
    raise EnvironmentFailure(
        f"the weights of {resolved.label} need {need / 2**30:.1f} GiB of memory, and {have / 2**30:.1f} GiB are there",
        f"{smaller}; --force goes on",
    )
