"""`medgpt pull`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import PullSettings


def run(settings: PullSettings, observer: Observer) -> dict[str, Any]:
    """Fetch a model, or list what can be fetched; the answer goes to stdout."""
    from medicalgpt_cli.engine.model.pull import CATALOGUE, catalogue, pull
    from medicalgpt_cli.terminal.console import results

    if settings.list:
        models = catalogue()
        if not settings.json:
            from medicalgpt_cli.terminal.models_view import show_models

            show_models(models)
        return {"models": models}
    folder = pull(settings, observer)
    licence = CATALOGUE[str(settings.name)].licence
    if not settings.json:
        results().print(str(folder), soft_wrap=True, markup=False)
    observer.on_notice(f"licence {licence}; use it with --base-model {settings.name}")
    return {"name": settings.name, "folder": str(folder), "licence": licence}
