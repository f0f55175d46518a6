"""The device that a plan is for: what it has, and what is on it before a model comes."""

from __future__ import annotations

from pathlib import Path

import torch

from medicalgpt_cli.engine.model.loading import DTYPES, choose_device, choose_dtype
from medicalgpt_cli.engine.model.references import ResolvedModel
from medicalgpt_cli.engine.run import environment, processes
from medicalgpt_cli.settings.groups import DeviceSettings

# What a process takes on a GPU before any tensor; read of others, not measured here.
CUDA_CONTEXT = 600 * 2**20


def for_gpu(settings: DeviceSettings, here: torch.device) -> bool:
    """Whether a GPU is planned for: the one that is here, or as `--plan-for` says."""
    on = getattr(settings, "plan_for", "here")
    return here.type == "cuda" if on == "here" else on == "gpu"


def dtype_for(settings: DeviceSettings, device: torch.device, on_gpu: bool) -> torch.dtype:
    """The number format of weights on the device that is planned for."""
    if on_gpu and device.type != "cuda":  # a GPU that is not here: one of today's
        return torch.bfloat16 if settings.dtype == "auto" else DTYPES[settings.dtype]
    if not on_gpu and device.type == "cuda":
        return torch.float32 if settings.dtype == "auto" else DTYPES[settings.dtype]
    return choose_dtype(settings, device)


def device_memory(settings: DeviceSettings, on_gpu: bool, gpus: int = 1) -> int | None:
    """Bytes that a process can have here, on several GPUs all together; None for a GPU that is not here."""
    device = choose_device(settings)
    if not on_gpu:
        have = environment.memory()["available"] + environment.memory_used()
        return have // max(settings.wanted_processes, processes.local_size())
    if device.type != "cuda":
        return None
    return sum(torch.cuda.mem_get_info(device.index + number)[0] for number in range(gpus))


def program_bytes(on_gpu: bool) -> int:
    """What a process holds of a device before it loads anything."""
    return CUDA_CONTEXT if on_gpu else environment.memory_used()


def file_bytes(resolved: ResolvedModel) -> int:
    """The base's files on the disk; 0 where they are not there yet."""
    folder = resolved.base.folder
    if folder is None or resolved.base.kind == "config":
        return 0
    if resolved.base.kind == "gguf":
        return Path(resolved.base.path).stat().st_size
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
