"""A process of a run that draws, scores and looks back over one rollout; prints what it did and what it then has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from medicalgpt_cli.engine.training import attention, together
from medicalgpt_cli.engine.training.ppo.rollout import values_of
from tests.engine.training.ppo.test_learning import Known, roles_of, settings_of, trainer_of


def main(place: Path, prompts: int) -> None:
    scored = 0

    def rule(_, texts, answers):
        nonlocal scored
        scored += len(texts)
        return [sum(answer) % 11 / 11 for answer in answers]

    together.join(torch.device("cpu"))
    stage = Known(settings_of(place, batch_size=prompts, minibatch_size=1, max_new_tokens=5), rule)
    roles = roles_of(stage)
    torch.nn.init.normal_(roles.value_head.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    trainer = trainer_of(stage, roles, place / "nowhere")
    looked_at = 0

    def count(_, inputs, __) -> None:
        nonlocal looked_at
        looked_at += inputs[0].shape[0]

    with attention.for_batches(roles, stage.padding_free):
        hook = roles.value_head.register_forward_hook(count)
        rollout = trainer.roll_out(roles, stage.data.training[:prompts])
        scores = stage.rewards([one.prompt for one in rollout.asked], rollout.texts, rollout.answers)
        seen = looked_at
        again = values_of(roles, rollout.asked, rollout.answers, stage._lay, batch_size=2)
        hook.remove()
    tensors = {name: getattr(rollout, name).tolist() for name in ("logp", "ref_logp", "values", "entropy")}
    found = {
        "scored": scored, "tokens": seen, "scores": scores, "texts": rollout.texts, "again": again.tolist(),
        "ended": rollout.ended.tolist(), **tensors,
    }  # fmt: skip
    print(json.dumps(found))
    together.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
