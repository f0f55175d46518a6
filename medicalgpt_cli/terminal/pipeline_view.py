"""What a pipeline came to, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_result(result: Mapping[str, Any]) -> None:
    """Held-out figures before and after, and where the report is; of a dry run, the order of the steps."""
    from rich.table import Table
    from rich.text import Text

    from medicalgpt_cli.terminal.console import results

    console = results()
    if "figures" not in result:
        for name, place in result["steps"].items():
            console.print(f"{name} → {place}", soft_wrap=True, markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("step", "on data not trained on"):
        table.add_column(name)
    for name in ("before", "after", "95 %", "difference, 95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in result["figures"]:
        style = {True: "green", False: "red", None: ""}[one["better"]]
        table.add_row(
            one["step"],
            Text(one["name"]),
            one["before"],
            Text(one["after"], style),
            one["interval"],
            one["difference"],
        )
    console.print(table)
    console.print(f"report  {result['report']}", soft_wrap=True, markup=False)
