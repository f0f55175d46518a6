"""`medgpt reward`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.commands.dry_run import plan_shown
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import RewardSettings


def run(settings: RewardSettings, observer: Observer) -> dict[str, Any]:
    from medicalgpt_cli.engine.training.loop import run as train
    from medicalgpt_cli.engine.training.reward import RewardStage

    stage = RewardStage(settings, observer)
    return plan_shown(stage) if settings.dry_run else train(stage, observer)
