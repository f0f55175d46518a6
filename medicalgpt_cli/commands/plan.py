"""`medgpt plan STAGE`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.planning import (
    PlanInferSettings,
    PlanPretrainSettings,
    PlanRewardSettings,
    PlanRlSettings,
)


def run(settings: Any, observer: Observer) -> dict[str, Any]:
    found = _plan(settings, observer)
    if not settings.json:
        from medicalgpt_cli.terminal.plan_view import show_plan

        show_plan(found)
    return found


def _plan(settings: Any, observer: Observer) -> dict[str, Any]:
    if isinstance(settings, PlanInferSettings):
        from medicalgpt_cli.engine.planning.answering import plan_of_answers

        return plan_of_answers(settings, observer)
    from medicalgpt_cli.engine.planning.plan import plan_of

    return plan_of(_stage(settings)(settings, observer))


def _stage(settings: Any) -> Any:
    if isinstance(settings, PlanPretrainSettings):
        from medicalgpt_cli.engine.training.pretrain import PretrainStage

        return PretrainStage
    if isinstance(settings, PlanRewardSettings):
        from medicalgpt_cli.engine.training.reward import RewardStage

        return RewardStage
    if isinstance(settings, PlanRlSettings):
        from medicalgpt_cli.engine.training.rl import RlStage

        return RlStage
    from medicalgpt_cli.engine.training.sft import SftStage

    return SftStage
