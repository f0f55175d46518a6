"""What a run or a bug report needs to know about the machine: versions, processor, memory, GPUs, disk.

No user, host or full path names: the home folder is written as ~.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medicalgpt_cli import __version__

LIBRARIES = (
    "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "tokenizers",
    "safetensors", "typer", "rich", "gradio", "deepspeed", "liger-kernel", "flash-attn", "torchao",
    "markitdown", "pdfplumber", "python-calamine",
)  # fmt: skip

# Variables that change what medgpt does; their values are shown, so none may hold a secret or an address.
VARIABLES = (
    "MEDGPT_HOME", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NO_COLOR",
)  # fmt: skip

# What makes bf16 native on a processor; int8 ones matter to quantised decoding.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16", "sve")


def describe() -> dict[str, Any]:
    """Everything, as plain data. Imports torch to ask for GPUs (about a second)."""
    return {
        "medgpt": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": library_versions(),
        "cpu": cpu(),
        "memory": memory(),
        "gpus": gpus(),
        "disk": {"working_folder": disk_free(Path()), "cache": disk_free(cache_folder())},
        "cache": home_relative(cache_folder()),
        "variables": {name: home_relative(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide about results; imports none of them."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cache_folder() -> Path:
    """Where pulled models live: $MEDGPT_HOME, or ~/.cache/medgpt."""
    return Path(os.environ.get("MEDGPT_HOME") or Path.home() / ".cache" / "medgpt")


def home_relative(path: Path | str) -> str:
    """A path with ~ for the home folder, so that no user name is shown."""
    home, text = str(Path.home()), str(path)
    return "~" + text[len(home) :] if text == home or text.startswith(home + os.sep) else text


def cpu() -> dict[str, Any]:
    """Model name, cores that this process may use, and number formats that it computes natively."""
    name, features = platform.processor() or platform.machine(), []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = fields.get("model name", name)
        known = set((fields.get("flags") or fields.get("Features") or "").split())
        features = [feature for feature in _CPU_FEATURES if feature in known]
    affinity = getattr(os, "sched_getaffinity", None)
    return {"name": name, "cores": len(affinity(0)) if affinity else os.cpu_count(), "features": features}


def memory() -> dict[str, int]:
    """Bytes in all and bytes free: of the machine, or of the container or the job that bounds this process."""
    import psutil

    state = psutil.virtual_memory()
    total, available = state.total, state.available
    for limit, held in control_groups():
        total, available = min(total, limit), min(available, max(limit - held, 0))
    return {"total": total, "available": available}


def control_groups(
    own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[int, int]]:
    """What each control group that this process is in allows and holds, in bytes.

    Cached files are not held: the kernel drops them where memory is short. Both versions of control groups; a
    container sees its own group as the root, a job of Slurm or systemd lies further down (the kernel's
    documentation, admin-guide/cgroup-v2 and cgroup-v1/memory).
    """
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, most, now, prefix = mounted, "memory.max", "memory.current", ""
            elif "memory" in controllers.split(","):
                root, most, now = mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                prefix = "total_"
            else:
                continue
            group = root / path.lstrip("/")
            for place in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # not seen from here, or without a limit
                    limit, used = int((place / most).read_text()), int((place / now).read_text())
                    state = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                    cached = sum(int(state.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                    yield limit, used - cached
                if place == root:
                    break


def memory_used(device: str = "cpu") -> int:
    """Bytes in use: on a GPU the most that tensors took so far, else this process's resident memory."""
    torch = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes, compute capability and native bf16 of each visible GPU."""
    import torch

    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        found.append(
            {
                "number": number,
                "name": about.name,
                "memory": about.total_memory,
                "capability": f"{about.major}.{about.minor}",
                "bf16": about.major >= 8,
                "cuda": torch.version.cuda,
            }
        )
    return found


def disk_free(folder: Path) -> int | None:
    """Free bytes on the disk that holds `folder`, or would hold it."""
    folder = folder.absolute()
    for place in (folder, *folder.parents):
        if place.exists():
            return shutil.disk_usage(place).free
    return None
