"""What grpo may do otherwise: each option beside values worked out by hand, and beside loops over plain floats."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.ppo import mathematics
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.stages import OF_GRPO, RlSettings
from tests.engine.training.ppo.test_learning import Known, roles_of, settings_of, trainer_of
from tests.engine.training.ppo.test_reward_units import SMALL, Heard, rule, step
from tests.tiny import tiny_model, write_jsonl

# Two answers, of two tokens and of one. Ratios 1.5 and 0.5 with an advantage of 1, and 2 with one of -1.
MASK = torch.tensor([[True, True], [True, False]])
LOGP = torch.tensor([[1.5, 0.5], [2.0, math.nan]], dtype=torch.float64).log()
OLD = torch.zeros(2, 2, dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0, 1.0], [-1.0, 7.0]], dtype=torch.float64)


def loss(weights: torch.Tensor, **options) -> float:
    return float(mathematics.policy_loss(LOGP, OLD, ADVANTAGES, MASK, 0.2, weights=weights, **options)[0])


@pytest.mark.parametrize(
    ("normalisation", "whole", "first_alone"),
    [
        # Held at 1.2: -1.2 - 0.5 and 2. Of tokens, of answers, and of 2 answers of up to 4 tokens.
        ("token", 0.3 / 3, -1.7 / 2),
        ("sequence", (-1.7 / 2 + 2) / 2, -1.7 / 2 / 2),
        ("constant", 0.3 / 8, -1.7 / 8),
    ],
)
def test_normalisations_by_hand(normalisation: str, whole: float, first_alone: float) -> None:
    assert loss(mathematics.token_weights(MASK, normalisation, 4)) == pytest.approx(whole)
    # The second answer was cut off and left out; for "sequence" and "constant" it still is one of two.
    learnt = MASK & torch.tensor([[True], [False]])
    assert loss(mathematics.token_weights(learnt, normalisation, 4)) == pytest.approx(first_alone)


def test_a_higher_upper_clip_by_hand() -> None:
    weights = mathematics.token_weights(MASK, "token", 4)
    assert loss(weights, clip_range_high=0.28) == pytest.approx((-1.28 - 0.5 + 2) / 3)


def test_ratios_of_whole_answers_by_hand() -> None:
    weights = mathematics.token_weights(MASK, "sequence", 4)
    ratio = math.sqrt(1.5 * 0.5)  # 0.866, within 0.2 of 1
    assert loss(weights, of_sequences=True) == pytest.approx((-ratio + 2) / 2)
    # Its gradient goes to every token of the answer alike: -ratio / 2 tokens / 2 answers.
    logp = LOGP.clone().requires_grad_()
    mathematics.policy_loss(logp, OLD, ADVANTAGES, MASK, 0.2, weights=weights, of_sequences=True)[
        0
    ].backward()
    assert logp.grad.tolist() == [pytest.approx([-ratio / 4] * 2), pytest.approx([1.0, 0.0])]


def test_advantages_without_the_standard_deviation_by_hand() -> None:
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 3.0])
    plain = mathematics.group_advantages(scores, 4, scale=False)
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0, 0.0, 0.0]
    assert mathematics.alike(scores, 4).tolist() == [False, True]
    assert mathematics.alike(torch.tensor([1e-7, 2e-7, 5.0, 5.0 + 1e-7]).double(), 2).tolist() == [
        False,
        True,
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    tiny_model(folder / "model")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"What about {n}?"} for n in range(24)])
    return folder


OPTIONS = [
    {},
    {"loss_normalisation": "constant", "scale_advantages": False},
    {"loss_normalisation": "sequence", "clip_range_high": 0.5, "mask_truncated": True},
    {"importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence", "loss_normalisation": "token", "mask_truncated": True},
]


def test_the_losses_of_all_options_equal_plain_loops(place: Path, tmp_path: Path) -> None:
    """Also in micro-batches: they add up."""
    beta, size, most = 0.3, 3, 5
    sizes = {"batch_size": 2, "group_size": size, "minibatch_size": 6, "max_new_tokens": most}
    settings = settings_of(place, algorithm="grpo", kl_coefficient=beta, **sizes)
    roles = roles_of(Known(settings, rule))
    for name, weight in roles.policy.named_parameters():  # a policy that is not the reference
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    for options in OPTIONS:
        stage = Known(settings_of(place, algorithm="grpo", kl_coefficient=beta, **sizes, **options), rule)
        stage.load(Heard())
        stage.padding_free = True
        trainer = trainer_of(stage, roles, tmp_path)
        with attention.for_batches(roles, True):
            rollout = trainer.roll_out(roles, stage.data.training[:2])
            new = rollout.logp.clone()
            generator = torch.Generator().manual_seed(2)
            rollout.logp = rollout.logp + 0.5 * torch.randn(new.shape, generator=generator) * rollout.mask
            rollout.ended = torch.tensor([True, False, True, True, False, True])
            scores = rule(None, rollout.texts, rollout.answers)
            advantages, returns = trainer._advantages(torch.tensor(scores), rollout)
            step_of_all = trainer._gradient_step(rollout, range(6))
            parts = [
                float(found.detach())
                for piece in ([0, 1, 2, 3], [4, 5])
                for found, _ in trainer.minibatch_losses(
                    roles, rollout, piece, advantages, returns, step_of_all
                )
            ]
        expected = looped(rollout, new, scores, beta, size, most, stage.settings)
        assert sum(parts) == pytest.approx(expected, abs=1e-5), options


def looped(rollout, new, scores, beta, size, most, settings: RlSettings) -> float:
    """The loss with its price of KL, answer by answer, as the papers have it."""
    losses: list[list[float]] = []
    for index, answer in enumerate(rollout.answers):
        group = scores[index // size * size : index // size * size + size]
        advantage = scores[index] - sum(group) / size
        if settings.scale_advantages:
            spread = math.sqrt(sum((one - sum(group) / size) ** 2 for one in group) / (size - 1))
            advantage /= spread + 1e-4
        ratios = [math.exp(float(new[index, t] - rollout.logp[index, t])) for t in range(len(answer))]
        if settings.importance_sampling_level == "sequence":
            ratios = [math.prod(ratios) ** (1 / len(answer))] * len(answer)
        high = settings.clip_range_high or settings.clip_range
        row = []
        for t, ratio in enumerate(ratios):
            held = min(max(ratio, 1 - settings.clip_range), 1 + high)
            apart = float(rollout.ref_logp[index, t] - new[index, t])
            row.append(-min(ratio * advantage, held * advantage) + beta * (math.exp(apart) - apart - 1))
        is_left_out = settings.mask_truncated and not rollout.ended[index]
        losses.append([] if is_left_out else row)
    total, tokens = sum(map(sum, losses)), sum(map(len, losses))
    if settings.loss_normalisation == "sequence":
        return sum(sum(row) / len(row) for row in losses if row) / len(losses)
    return total / (len(losses) * most if settings.loss_normalisation == "constant" else tokens)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_others_refuse_what_they_do_not_have(algorithm: str) -> None:
    given = {
        "clip_range_high": 0.28, "importance_sampling_level": "sequence", "loss_normalisation": "token",
        "scale_advantages": False, "mask_truncated": True,
    }  # fmt: skip
    assert given.keys() == set(OF_GRPO)
    for name, value in given.items():
        with pytest.raises(UsageError, match=f"is not for {algorithm}"):
            RlSettings(train_data=("a",), reward_rule=("length",), algorithm=algorithm, **{name: value})


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_reward_that_tells_nothing_apart_is_warned_of(place: Path, tmp_path: Path, algorithm: str) -> None:
    sizes = {} if algorithm == "ppo" else {"batch_size": 2, "group_size": 3}
    stage = Known(
        settings_of(place, algorithm=algorithm, **{**SMALL, **sizes}), lambda *of: [0.0] * len(of[1])
    )
    roles = roles_of(stage)
    stage.observer = heard = Heard()
    trainer = trainer_of(stage, roles, tmp_path)
    for number in range(2):
        step(trainer, stage, roles, number)
    words = (
        "every answer was cut off at --max-new-tokens 5",
        ("every answer got the same reward" if algorithm == "ppo" else "100% of the prompts got one reward"),
    )
    assert len(heard.warnings) == 2  # once, not with every step
    assert all(word in said for word, said in zip(words, heard.warnings, strict=True))
    if algorithm == "grpo":
        assert [one["frac_reward_zero_std"] for one in trainer.measures] == [1.0, 1.0]
