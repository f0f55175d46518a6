"""`medgpt merge-lora`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import MergeLoraSettings


def run(settings: MergeLoraSettings, observer: Observer) -> dict[str, Any]:
    """Merge; the new folder's name goes to stdout."""
    from medicalgpt_cli.engine.model.merging import merge

    report = merge(settings, observer)
    if not settings.json:
        from medicalgpt_cli.terminal.console import results

        results().print(report["folder"], soft_wrap=True, markup=False)
    return report
