"""`--dry-run` of the training commands: the plan, and nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def plan_shown(stage: Any, examples: Sequence[Any] = ()) -> dict[str, Any]:
    """Show what a stage would do (a table, or what `--json` prints), with one of `examples`."""
    from medicalgpt_cli.engine.run.manifest import with_origins

    origins = with_origins(stage.settings)
    if not stage.settings.json:
        from medicalgpt_cli.terminal.data_view import show_plan

        show_plan(stage.plan(), origins, stage.data.report, examples, stage.tokenizer)
    return {"stage": stage.name, "plan": stage.plan(), "data": stage.data.report, "settings": origins}
