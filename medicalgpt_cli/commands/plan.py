"""`medgpt plan STAGE`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.planning import PlanPretrainSettings, PlanRewardSettings, PlanRlSettings


def run(settings: Any, observer: Observer) -> dict[str, Any]:
    from medicalgpt_cli.engine.planning.plan import plan_of

    stage = _stage(settings)(settings, observer)
    found = plan_of(stage)
    if not settings.json:
        from medicalgpt_cli.terminal.plan_view import show_plan

        show_plan(found)
    return found


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
