"""Defaults of reinforcement learning that follow from other settings, and the course of the learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.stages import RlSettings
from tests.engine.training.ppo.test_learning import Known, roles_of, settings_of, trainer_of, wanted_share
from tests.tiny import tiny_model, write_jsonl


def asked(**more) -> RlSettings:
    return RlSettings(train_data=("prompts.jsonl",), **{"reward_rule": ("length",), **more})


@pytest.mark.parametrize(
    ("algorithm", "processes", "prompts", "minibatch"),
    [("ppo", 1, 128, 32), ("ppo", 8, 16, 32), ("rloo", 1, 32, 64), ("grpo", 3, 11, 64)],
)
def test_sizes_of_a_rollout(algorithm: str, processes: int, prompts: int, minibatch: int) -> None:
    found = asked(algorithm=algorithm).completed(processes, 1e-5)
    assert (found.batch_size, found.minibatch_size) == (prompts, minibatch)
    assert found.ppo_epochs == 1
    assert found.answers_a_prompt == (1 if algorithm == "ppo" else 8)
    assert found.completed(processes, 1e-5) == found


def test_a_minibatch_is_at_most_the_rollout() -> None:
    assert asked(batch_size=6).completed(1, 1e-5).minibatch_size == 6
    assert asked(batch_size=3, algorithm="grpo", group_size=2).completed(2, 1e-5).minibatch_size == 12
    with pytest.raises(UsageError, match=r"--minibatch-size 300 is larger than --batch-size 32 times"):
        asked(algorithm="grpo", minibatch_size=300).completed(1, 1e-5)


def test_lambda_and_the_value_functions_rate_follow_from_others() -> None:
    rules, model = asked().completed(1, 3e-6), asked(reward_model="rm").completed(1, 3e-6)
    assert (rules.gae_lambda, model.gae_lambda) == (1.0, 0.95)
    assert rules.value_learning_rate == pytest.approx(3e-5)
    given = asked(gae_lambda=0.0, value_learning_rate=1e-3).completed(1, 3e-6)
    assert (given.gae_lambda, given.value_learning_rate) == (0.0, 1e-3)
    assert asked(algorithm="grpo").completed(1, 3e-6).gae_lambda is None


def test_both_rates_end_at_a_tenth_of_their_peaks(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What about {n}?"} for n in range(24)])
    stage = Known(settings_of(tmp_path, learning_rate=1e-3, warmup_ratio=0.0), wanted_share)
    trainer = trainer_of(stage, roles_of(stage), tmp_path)
    trainer.create_scheduler(num_training_steps=20)
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([1e-3, 1e-2])
    for _ in range(20):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([1e-4, 1e-3])
