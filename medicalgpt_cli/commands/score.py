"""`medgpt score`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import ScoreSettings


def run(settings: ScoreSettings, observer: Observer) -> dict[str, Any]:
    """Score a file; figures of pairs go to stderr, as the scores may go to stdout."""
    from medicalgpt_cli.engine.evaluation.score import score
    from medicalgpt_cli.engine.run.summary import part_table

    report = score(settings, observer)
    head, rows = part_table({}, report)
    for row in rows:
        observer.on_notice(", ".join(f"{name} {cell}" for name, cell in zip(head[1:], row[1:], strict=True)))
    return report
