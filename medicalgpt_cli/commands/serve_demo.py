"""`medgpt serve-demo`."""

from __future__ import annotations

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import ServeSettings


def run(settings: ServeSettings, observer: Observer) -> None:
    from medicalgpt_cli.serving.app import serve

    serve(settings, observer)
