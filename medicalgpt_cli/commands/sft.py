"""`medgpt sft`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import SftSettings


def run(settings: SftSettings, observer: Observer) -> dict[str, Any]:
    from medicalgpt_cli.engine.run.manifest import with_origins
    from medicalgpt_cli.engine.training.sft import plan_sft, run_sft

    if not settings.dry_run:
        return run_sft(settings, observer)
    planned = plan_sft(settings, observer)
    origins = with_origins(planned.settings)
    if not settings.json:
        from medicalgpt_cli.terminal.data_view import show_plan

        show_plan(planned.as_dict(), origins, planned.data.report, planned.data.training, planned.tokenizer)
    return {"stage": "sft", "plan": planned.as_dict(), "data": planned.data.report, "settings": origins}
