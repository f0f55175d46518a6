"""`medgpt vocabulary`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import VocabularySettings


def run(settings: VocabularySettings, observer: Observer) -> dict[str, Any]:
    """Widen the vocabulary; the new folder's name goes to stdout, the report to stderr."""
    from medicalgpt_cli.engine.model.vocabulary import extend

    report = extend(settings, observer)
    if not settings.json:
        from medicalgpt_cli.terminal.console import results
        from medicalgpt_cli.terminal.vocabulary_view import show_vocabulary

        show_vocabulary(report)
        results().print(report["folder"], soft_wrap=True, markup=False)
    return report
