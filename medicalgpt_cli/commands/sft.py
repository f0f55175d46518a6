"""`medgpt sft`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.commands.dry_run import plan_shown
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import SftSettings


def run(settings: SftSettings, observer: Observer) -> dict[str, Any]:
    from medicalgpt_cli.engine.training.loop import run as train
    from medicalgpt_cli.engine.training.sft import SftStage

    stage = SftStage(settings, observer)
    if not settings.dry_run:
        return train(stage, observer)
    return plan_shown(stage, stage.data.training)
