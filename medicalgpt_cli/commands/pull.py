"""`medgpt pull`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import PullSettings


def run(settings: PullSettings, observer: Observer) -> dict[str, Any]:
    """Fetch a model, or list what can be fetched; the answer goes to stdout."""
    from medicalgpt_cli.engine.model.pull import CATALOGUE, pull
    from medicalgpt_cli.engine.model.references import pulled_models

    if settings.list:
        models = {
            name: {
                "about": known.about,
                "licence": known.licence,
                "megabytes": known.megabytes,
                "pulled": (pulled_models() / name).is_dir(),
            }
            for name, known in CATALOGUE.items()
        }
        lines = [
            f"{name}  {one['about']}; {one['licence']}; {one['megabytes']} MB"
            + ("; in the cache" if one["pulled"] else "")
            for name, one in models.items()
        ]
        _say(settings, lines)
        return {"models": models}
    folder = pull(settings, observer)
    licence = CATALOGUE[str(settings.name)].licence
    _say(settings, [str(folder)])
    observer.on_notice(f"licence {licence}; use it with --base-model {settings.name}")
    return {"name": settings.name, "folder": str(folder), "licence": licence}


def _say(settings: PullSettings, lines: list[str]) -> None:
    if settings.json:
        return
    from medicalgpt_cli.terminal.console import results

    console = results()
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
