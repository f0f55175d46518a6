"""`medgpt env` on a terminal: two columns that can be pasted into a bug report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medicalgpt_cli.terminal.console import results
from medicalgpt_cli.terminal.progress import size


def show_environment(found: Mapping[str, Any]) -> None:
    """Print what engine/run/environment.describe found, one fact a line, without box lines."""
    from rich.text import Text

    console, lines = results(), rows(found)
    width = max(len(label) for label, _ in lines) + 2
    for label, value in lines:
        console.print(Text.assemble((label.ljust(width), "cyan"), value), soft_wrap=True)


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) in the order a person asks."""
    cpu, memory, disk = found["cpu"], found["memory"], found["disk"]
    lines = [
        ("medgpt", found["medgpt"]),
        ("python", found["python"]),
        ("system", found["system"]),
        (
            "processor",
            f"{cpu['name']}, {cpu['cores']} cores ({' '.join(cpu['features']) or 'no known extension'})",
        ),
        ("memory", f"{size(memory['available'])} free of {size(memory['total'])}"),
    ]
    for gpu in found["gpus"]:
        native = "native bf16" if gpu["bf16"] else "no native bf16"
        about = (
            gpu["name"],
            size(gpu["memory"]),
            f"capability {gpu['capability']}",
            native,
            f"CUDA {gpu['cuda']}",
        )
        lines.append((f"gpu {gpu['number']}", ", ".join(about)))
    if not found["gpus"]:
        lines.append(("gpu", "none"))
    lines.append(
        ("disk", f"{size(disk['working_folder'])} free here, {size(disk['cache'])} free for the cache")
    )
    lines.append(("model cache", found["cache"]))
    lines.extend(found["versions"].items())
    lines.extend((name, value or "(empty)") for name, value in found["variables"].items())
    return lines
