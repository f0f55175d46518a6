"""The models of `medgpt pull --list`, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_models(models: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.table import Table

    from medicalgpt_cli.terminal.console import results

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("name", no_wrap=True)
    table.add_column("model")
    table.add_column("languages")
    table.add_column("licence")
    for number in ("weights", "context", "LoRA 16-bit", "4-bit"):
        table.add_column(number, justify="right", no_wrap=True)
    for name, one in models.items():
        size = one["parameters"]
        table.add_row(
            name,
            one["about"] + (" (in the cache)" if one["pulled"] else ""),
            one["languages"],
            one["licence"],
            f"{size:g} B" if size >= 0.4 else f"{1000 * size:g} M",
            f"{one['context']:,}",
            f"{one['lora_gb_16bit']:.1f} GB",
            f"{one['lora_gb_4bit']:.1f} GB",
        )
    console = results()
    console.print(table)
    console.print(
        "GB: about what LoRA takes on 16-bit and on 4-bit weights, one example of 1,024 tokens; a rule of thumb.",
        style="dim",
        soft_wrap=True,
    )
