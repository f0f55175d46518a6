"""`medgpt env`: what a bug report needs."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import EnvSettings


def run(settings: EnvSettings, observer: Observer) -> dict[str, Any]:
    """Describe the machine; the terminal view goes to stdout, since it is the result that was asked for."""
    from medicalgpt_cli.engine.run.environment import describe

    found = describe()
    if not settings.json:
        from medicalgpt_cli.terminal.environment_view import show_environment

        show_environment(found)
    return found
