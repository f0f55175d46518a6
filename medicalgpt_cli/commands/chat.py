"""`medgpt chat`."""

from __future__ import annotations

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import ChatSettings


def run(settings: ChatSettings, observer: Observer) -> None:
    from medicalgpt_cli.terminal.chat import chat

    chat(settings, observer)
