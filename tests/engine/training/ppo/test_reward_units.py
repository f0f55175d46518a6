"""Units of the reward: where scores are normalised, neither a constant nor a positive factor changes an update."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.ppo.roles import Roles
from medicalgpt_cli.engine.training.ppo.trainer import PPOTrainer
from medicalgpt_cli.engine.training.rl import RlStage
from tests.engine.training.ppo.test_learning import Known, roles_of, settings_of, trainer_of
from tests.tiny import tiny_model, tiny_tokenizer, write_jsonl

SMALL = {"batch_size": 6, "minibatch_size": 3, "max_new_tokens": 5, "ppo_epochs": 2, "learning_rate": 1e-3}


class Heard(Observer):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    tiny_model(folder / "model")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"What about {n}?"} for n in range(24)])
    reward_model(folder)
    return folder


def reward_model(place: Path) -> None:
    """An adapter with a head over the same base, whose scores depend on the answer."""
    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=1)
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]
    )
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(place / "reward")
    tiny_tokenizer().save_pretrained(place / "reward")
    (place / "reward" / "reward.json").write_text(json.dumps({"format": 1, "head_trained": True}))


def moved_reward_model(place: Path, to: Path, factor: float, constant: float) -> Path:
    """The same reward model with scores times `factor` plus `constant`."""
    to.mkdir()
    for file in (place / "reward").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    file = to / "adapter_model.safetensors"
    weights = {name: weight.double() for name, weight in load_file(file).items()}
    head = next(name for name in weights if ".score." in name)
    weights[head] = weights[head] * factor
    weights[head.replace("weight", "bias")] = torch.tensor([constant], dtype=torch.float64)
    save_file(weights, file)
    return to


def learnt(stage: RlStage, roles: Roles, tmp_path: Path, steps: int = 2) -> dict[str, torch.Tensor]:
    """What learns, in float64, after some steps."""
    trainer = ready(stage, roles, tmp_path)
    for number in range(steps):
        step(trainer, stage, roles, number)
    return {name: weight.detach() for name, weight in roles.named_parameters() if weight.requires_grad}


def ready(stage: RlStage, roles: Roles, tmp_path: Path) -> PPOTrainer:
    roles.double()
    if roles.reward_head is not None and stage.settings.reward_model:  # in all its digits
        saved = load_file(Path(stage.reward_resolved.adapter.path) / "adapter_model.safetensors")
        for name, weight in saved.items():
            if ".score." in name:
                getattr(roles.reward_head, name.rpartition(".")[2]).data.copy_(weight)
    return trainer_of(stage, roles, tmp_path)


def step(trainer: PPOTrainer, stage: RlStage, roles: Roles, number: int) -> None:
    trainer.state.global_step = number
    size = stage.settings.batch_size
    with attention.for_batches(roles, stage.padding_free):
        trainer.training_step(roles, {"asked": stage.data.training[number * size : (number + 1) * size]})
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], rtol=0, atol=1e-9), name


MOVES = [(1.0, 20.0), (1e-6, 0.0), (1e3, -5e3)]


def rule(prompts, texts, answers):
    """Of the answers' tokens, so that it varies within a group, too."""
    return [sum(token % 7 for token in answer) / 7 for answer in answers]


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_a_rule_in_other_units_makes_the_same_updates(place: Path, tmp_path: Path, algorithm: str) -> None:
    sizes = {"batch_size": 6} if algorithm == "ppo" else {"batch_size": 2, "group_size": 3}
    settings = settings_of(place, algorithm=algorithm, **{**SMALL, **sizes})

    def run(factor: float, constant: float) -> dict[str, torch.Tensor]:
        stage = Known(settings, lambda *of: [factor * score + constant for score in rule(*of)])
        return learnt(stage, roles_of(stage), tmp_path)

    plain = run(1.0, 0.0)
    assert any(weight.abs().max() > 1e-4 for name, weight in plain.items() if "lora_B" in name)
    for move in MOVES:
        assert_equal(run(*move), plain)


def test_a_reward_model_in_other_units_makes_the_same_updates(place: Path, tmp_path: Path) -> None:
    """The value function starts from the reward model: its head has to be in the units that are learnt from."""

    def run(model: Path, *rules: str) -> dict[str, torch.Tensor]:
        settings = replace(settings_of(place, reward_model=str(model), **SMALL), reward_rule=rules)
        stage = RlStage(settings, Observer())
        return learnt(stage, roles_of(stage), tmp_path)

    plain = run(place / "reward")
    assert plain["value_head.weight"].abs().max() > 0
    for number, move in enumerate(MOVES):
        assert_equal(run(moved_reward_model(place, tmp_path / str(number), *move)), plain)
    # Beside a rule, whose weight stays where it is, a constant alone.
    assert_equal(run(tmp_path / "0", "length:0.5"), run(place / "reward", "length:0.5"))


def test_the_value_function_starts_as_the_normalised_score(place: Path, tmp_path: Path) -> None:
    settings = settings_of(place, reward_model=str(place / "reward"), reward_weight=0.5, **SMALL)
    stage = RlStage(settings, Observer())
    roles = roles_of(stage)
    trainer = ready(stage, roles, tmp_path)
    with attention.for_batches(roles, stage.padding_free):
        rollout = trainer.roll_out(roles, stage.data.training[:6])
        prompts = [one.prompt for one in rollout.asked]
        scores = torch.tensor(stage.rewards(prompts, rollout.texts, rollout.answers), dtype=torch.float64)
        trainer._shaped(roles, scores, rollout)
        rows = rollout.rows(range(6))
        batch = stage._lay(rows)
        raw = torch.tensor(roles.scores(batch), dtype=torch.float64)
        values = roles.values(batch, batch["ends"]).detach()
    model = torch.tensor(stage.rewards.last["reward model"], dtype=torch.float64)
    expected = 0.5 * (raw - model.mean()) / scores.std(correction=0)
    assert torch.allclose(values, expected, rtol=0, atol=1e-9)
    # Later the moments move: what was 1 is then another number, and the values go with it.
    before, old = trainer.moments.mean, trainer.moments.spread
    with attention.for_batches(roles, stage.padding_free):
        trainer._shaped(roles, scores * 3 + 7, rollout)
        moved = roles.values(batch, batch["ends"]).detach()
    now = trainer.moments
    assert torch.allclose(moved * now.spread + now.mean, values * old + before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalise", [True, False])
def test_scores_that_are_clipped_are_counted_and_warned_of(
    place: Path, tmp_path: Path, normalise: bool
) -> None:
    settings = settings_of(place, normalise_scores=normalise, **SMALL)
    stage = Known(settings, lambda *of: [score + 20 for score in rule(*of)])
    roles = roles_of(stage)
    stage.observer = heard = Heard()
    trainer = trainer_of(stage, roles, tmp_path)
    for number in range(2):
        step(trainer, stage, roles, number)
    assert [one["score_clip_fraction"] for one in trainer.measures] == ([0.0] * 2 if normalise else [1.0] * 2)
    about = [said for said in heard.warnings if "--score-clip" in said]
    assert len(about) == (0 if normalise else 1)  # once, not with every step
    assert normalise or "step 1: 100% of the scores" in about[0]
