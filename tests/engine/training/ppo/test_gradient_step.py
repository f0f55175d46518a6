"""The gradient step: in pieces it is the same, and the value function does not shrink the policy's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from medicalgpt_cli.engine.planning.needs import needs
from medicalgpt_cli.engine.planning.plan import case_of
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.ppo.roles import Roles
from medicalgpt_cli.engine.training.rl import RlStage
from tests.engine.training.ppo.test_learning import Known, roles_of, settings_of, trainer_of, wanted_share
from tests.tiny import tiny_model, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("micro")
    tiny_model(folder / "model")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"What about {'it ' * n}{n}?"} for n in range(24)])
    return folder


def stage_of(place: Path, algorithm: str, **more) -> RlStage:
    sizes = {"batch_size": 6} if algorithm == "ppo" else {"batch_size": 2, "group_size": 3}
    settings = settings_of(
        place, algorithm=algorithm, minibatch_size=6, ppo_epochs=1, max_new_tokens=7, kl_coefficient=0.3,
        entropy_coefficient=0.1, **sizes, **more,
    )  # fmt: skip
    return Known(settings, wanted_share)


def gradients(stage: RlStage, tmp_path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Of the one gradient step of a rollout, and how often a layer was computed while learning."""
    roles = moved(roles_of(stage))
    trainer = trainer_of(stage, roles, tmp_path)
    computed = 0

    def count(*_) -> None:
        nonlocal computed
        computed += torch.is_grad_enabled()

    for module in roles.modules():
        if isinstance(module, LlamaAttention):
            module.register_forward_hook(count)
    with attention.for_batches(roles, stage.padding_free):
        asked = stage.data.training[: stage.settings.batch_size]
        trainer.training_step(roles, {"asked": asked})
    assert not any(module.training for module in roles.modules())
    return {name: w.grad for name, w in roles.named_parameters() if w.requires_grad}, computed


def moved(roles: Roles) -> Roles:
    """A policy that is not the reference, a value function that is not 0."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in roles.named_parameters():
        if "lora_B" in name or "value_head.weight" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=generator)
    return roles


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(
    place: Path, tmp_path: Path, algorithm: str
) -> None:
    whole, computed = gradients(stage_of(place, algorithm), tmp_path)
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
    for more in ({"micro_batch_size": 1}, {"micro_batch_size": 4, "gradient_checkpointing": True}):
        parts, again = gradients(stage_of(place, algorithm, **more), tmp_path)
        for name, gradient in whole.items():
            assert torch.allclose(parts[name], gradient, rtol=0, atol=1e-6), name
        passes = 6 if "gradient_checkpointing" not in more else 2 * 2  # two pieces, each computed twice
        assert again == passes * computed


def test_as_many_answers_as_fit(place: Path) -> None:
    stage = stage_of(place, "ppo")
    case, _ = case_of(stage)
    assert case.batch_size == 6
    asked = stage.settings
    assert stage.fitted(case, 10**15) is case and stage.settings.micro_batch_size == 6
    stage.settings = asked
    room = (needs(case.with_batch(2))["peak"] + needs(case.with_batch(3))["peak"]) // 2
    assert stage.fitted(case, room).batch_size == 2
    assert stage.settings.micro_batch_size == 2
    stage.settings = replace(asked, micro_batch_size=5)
    assert stage.fitted(case, room) is case and stage.settings.micro_batch_size == 5


def test_a_plan_knows_that_layers_are_computed_anew(place: Path) -> None:
    plain = case_of(stage_of(place, "ppo"))[0]
    again = replace(plain, checkpointing=True)
    assert again.rehearsed.peak < plain.rehearsed.peak


def test_the_weight_of_the_value_loss_leaves_the_policys_step_as_it_is(place: Path, tmp_path: Path) -> None:
    """Both gradients are far above what they are clipped to."""

    def stepped(value_coefficient: float) -> dict[str, torch.Tensor]:
        stage = stage_of(place, "ppo", value_coefficient=value_coefficient, max_grad_norm=1e-3)
        roles = moved(roles_of(stage))
        trainer = trainer_of(stage, roles, tmp_path)
        with attention.for_batches(roles, stage.padding_free):
            trainer.training_step(roles, {"asked": stage.data.training[:6]})
        trainer.optimizer.step()
        for name in ("policy", "value"):
            norm = sum(float(weight.grad.square().sum()) for weight in roles.learning[name]) ** 0.5
            assert norm == pytest.approx(1e-3, rel=1e-5)
        return {name: weight.detach() for name, weight in roles.policy.named_parameters()}

    one, ten = stepped(0.1), stepped(1.0)
    assert all(torch.equal(one[name], ten[name]) for name in one if ".default." in name)


def test_gradients_below_the_limit_are_left_alone(place: Path, tmp_path: Path) -> None:
    stage = stage_of(place, "ppo", max_grad_norm=5.0)
    trainer = trainer_of(stage, roles_of(stage), tmp_path)
    small, large = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [small]}, {"params": [large]}], lr=1.0)
    small.grad, large.grad = torch.tensor([3.0, 2.0]), torch.tensor([30.0, 40.0])
    trainer._clip(optimizer)
    assert small.grad.tolist() == [3.0, 2.0] and large.grad.tolist() == pytest.approx([3.0, 4.0])
