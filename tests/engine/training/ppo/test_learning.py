"""PPO where the answer is known: a tiny model, tasks whose optimum can be computed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.rewards.sources import WeightedReward
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.loop import run
from medicalgpt_cli.engine.training.ppo import mathematics
from medicalgpt_cli.engine.training.ppo.roles import Roles
from medicalgpt_cli.engine.training.ppo.rollout import draw, look_back, token_ids
from medicalgpt_cli.engine.training.ppo.trainer import PPOTrainer
from medicalgpt_cli.engine.training.rl import RlStage
from medicalgpt_cli.errors import TrainingFailed
from medicalgpt_cli.settings.stages import RlSettings
from tests.tiny import tiny_model, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    tiny_model(folder / "model")
    words = ["fever", "cough", "头痛", "糖尿病", "leukemia", "rest", "diet", "感冒"]
    write_jsonl(
        folder / "prompts.jsonl", [{"prompt": f"What about {word} {n}?"} for n in range(8) for word in words]
    )
    return folder


class Known(RlStage):
    """Reinforcement learning with a reward that the test computes from the answer's text and length."""

    def __init__(self, settings: RlSettings, reward):
        self.known = reward
        super().__init__(settings, Observer())

    def _rewards(self, roles, shared, observer):
        return WeightedReward({"known": (1.0, self.known)})


def settings_of(place: Path, **more) -> RlSettings:
    return RlSettings(
        base_model=str(place / "model"),
        train_data=(str(place / "prompts.jsonl"),),
        reward_rule=("length",),
        use_cpu=True,
        **more,
    )


def roles_of(stage: RlStage) -> Roles:
    roles = stage.load(Observer())
    stage.padding_free = stage.keeps_apart(roles, Observer())
    return roles.eval()


def wanted_share(prompts, texts, answers):
    """The share of an answer's tokens whose id is a multiple of four: 0.25 by chance, 1 at best."""
    return [sum(token % 4 == 0 for token in answer) / max(len(answer), 1) for answer in answers]


# One seed of each algorithm by default, five in the slow tests.
SEEDS = [
    pytest.param(algorithm, seed, marks=[pytest.mark.slow] if seed else [])
    for algorithm in ("ppo", "rloo", "grpo")
    for seed in range(5)
]


@pytest.mark.parametrize(("algorithm", "seed"), SEEDS)
def test_learns_the_task_whose_optimum_is_known(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, seed: int
) -> None:
    """The optimum is 1; what the untrained model gets is chance."""
    # Without a price on KL one answer to every prompt is an optimum, too: the watch for it would end a run that
    # has got there.
    monkeypatch.setattr("medicalgpt_cli.engine.training.ppo.trainer._ALIKE", 10**9)
    settings = settings_of(
        place,
        algorithm=algorithm,
        seed=seed,
        max_steps=70,
        batch_size=32 if algorithm == "ppo" else 8,  # prompts; the answers are as many
        group_size=8 if algorithm == "ppo" else 4,
        minibatch_size=16,
        ppo_epochs=4,
        max_new_tokens=8,
        learning_rate=1e-2,
        value_learning_rate=1e-2 if algorithm == "ppo" else None,
        eval_fraction=0.25,
        warmup_ratio=0.0,
        kl_coefficient=0.0,
        kl_limit=1e9,
        missing_end_penalty=0.0,
        eval_steps=1000,
        save_steps=1000,
        output_dir=tmp_path / "run",
    )
    result = run(Known(settings, wanted_share), Observer())
    assert result["before"]["reward"] == pytest.approx(0.25, abs=0.15)
    assert result["after"]["reward"] >= 0.95
    adapter = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM"  # the policy alone, an ordinary adapter


def test_with_a_price_on_kl_it_comes_to_the_closed_form_optimum(place: Path, tmp_path: Path) -> None:
    """One token is drawn: a bandit. Its optimum is pi(a) proportional to ref(a) * exp(r(a) / beta)."""
    beta, batch = 0.5, 128
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": "fever"}])
    settings = replace(
        settings_of(
            place,
            max_steps=80,
            ppo_epochs=2,
            batch_size=batch,
            minibatch_size=batch,
            rollout_size=batch,
            max_new_tokens=1,
            learning_rate=3e-3,
            warmup_ratio=0.0,
            kl_coefficient=beta,
            missing_end_penalty=0.0,
            normalise_scores=False,
            score_clip=None,
            save_steps=1000,
            eval_fraction=0.0,
            output_dir=tmp_path / "run",
        ),
        train_data=(str(tmp_path / "one.jsonl"),),
    )
    worth = torch.zeros(0)
    stage = Known(settings, lambda prompts, texts, answers: [float(worth[said[0]]) for said in answers])
    asked = stage.data.training[0]
    stage.data.training[:] = [asked] * batch
    roles = stage.load(Observer())

    def state() -> torch.Tensor:
        """The vector that the head turns into logits."""
        body = roles.policy.get_base_model().base_model
        with torch.no_grad():
            return body(input_ids=torch.tensor([asked.ids])).last_hidden_state[0, -1].double()

    words = roles.policy.get_output_embeddings().weight.detach().double()
    begin = state()
    # The optimum has to be one that the model can express: the begin turned by some degrees. The reward that has
    # it as optimum follows: beta * (difference of the logits).
    aside = torch.randn(len(begin), generator=torch.Generator().manual_seed(4)).double()
    aside -= begin * (aside @ begin) / (begin @ begin)
    goal = 0.93 * begin + (1 - 0.93**2) ** 0.5 * aside * begin.norm() / aside.norm()
    worth = beta * words @ (goal - begin)
    start = (words @ begin).softmax(0)
    optimum = start * (worth / beta).exp()
    optimum /= optimum.sum()
    assert total_variation(start, optimum) > 0.2  # there is something to learn

    stage.load = lambda observer: roles
    run(stage, Observer())
    assert total_variation((words @ state()).softmax(0), optimum) <= 0.05


def total_variation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().sum() / 2)


# -- parts -------------------------------------------------------------------------------------------------


def trainer_of(stage: RlStage, roles: Roles, tmp_path: Path) -> PPOTrainer:
    from medicalgpt_cli.engine.training.callbacks import StopOnSignal
    from medicalgpt_cli.engine.training.loop import _arguments, _trainer

    class Folder:
        checkpoints = tmp_path / "checkpoints"
        metrics = tmp_path / "metrics.jsonl"

    trainer = _trainer(stage, roles, _arguments(stage, Folder), Folder, StopOnSignal(), [], Observer())
    trainer.create_optimizer()
    return trainer


def test_log_probabilities_are_those_of_the_plain_model(place: Path) -> None:
    stage = Known(settings_of(place, max_new_tokens=12, temperature=0.7), wanted_share)
    roles = roles_of(stage)
    asked = stage.data.training[:7]
    with attention.for_batches(roles, stage.padding_free):
        answers = draw(stage._backend(roles), asked, 4, range(len(asked)))
        rollout = look_back(roles, asked, answers, stage._lay, temperature=0.7, batch_size=3)
    plain = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    for place_, (one, answer) in enumerate(zip(asked, answers, strict=True)):
        said = token_ids(answer)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([one.ids + said])).logits[0] / 0.7
        chances = logits.log_softmax(-1)
        expected = [float(chances[len(one.ids) - 1 + t, token]) for t, token in enumerate(said)]
        assert rollout.logp[place_, : len(said)].tolist() == pytest.approx(expected, abs=1e-4)
        assert rollout.mask[place_].sum() == len(said)
    # The adapter has learnt nothing yet: policy and reference are the same to the last bit.
    assert torch.equal(rollout.logp, rollout.ref_logp)


def test_draws_do_not_depend_on_the_batch(place: Path) -> None:
    stage = Known(settings_of(place, max_new_tokens=8), wanted_share)
    roles = roles_of(stage)
    asked = stage.data.training[:9]
    first = draw(stage._backend(roles), asked, 9, range(100, 100 + len(asked)))
    second = draw(stage._backend(roles), asked, 2, range(100, 100 + len(asked)))
    assert [token_ids(one) for one in first] == [token_ids(one) for one in second]
    third = draw(stage._backend(roles), asked, 9, range(200, 200 + len(asked)))
    assert [token_ids(one) for one in first] != [token_ids(one) for one in third]


def test_one_epoch_one_minibatch_lambda_1_is_reinforce_with_a_baseline(place: Path, tmp_path: Path) -> None:
    """The policy's gradient equals that of -mean(A * log p), with A = score - value, without the trainer's code."""
    stage = Known(
        settings_of(
            place, batch_size=6, minibatch_size=6, ppo_epochs=1, gae_lambda=1.0, max_new_tokens=6,
            kl_coefficient=0.0, value_coefficient=0.0,
        ),
        wanted_share,
    )  # fmt: skip
    roles = roles_of(stage)
    for name, weight in roles.policy.named_parameters():  # a policy that is not the reference
        if "lora_B" in name and ".default." in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(roles.value_head.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    trainer = trainer_of(stage, roles, tmp_path)
    asked = stage.data.training[:6]
    with attention.for_batches(roles, stage.padding_free):
        rollout = trainer.roll_out(roles, asked)
        scores = torch.tensor(wanted_share(None, rollout.texts, rollout.answers))
        rewards = mathematics.token_rewards(scores, rollout.logp, rollout.ref_logp, rollout.mask, 0.0)
        advantages, returns = mathematics.gae(rewards, rollout.values, rollout.mask, 1.0, 1.0)
        roles.zero_grad()
        for loss, _ in trainer.minibatch_losses(roles, rollout, range(6), advantages, returns):
            loss.backward()
    ours = {n: w.grad.clone() for n, w in roles.policy.named_parameters() if ".default." in n}

    roles.zero_grad()
    total, tokens = 0.0, 0
    with attention.for_batches(roles, False):
        for index, one in enumerate(asked):
            said = rollout.answers[index]
            logits = roles.policy(input_ids=torch.tensor([one.ids + said])).logits[0]
            chances = logits.log_softmax(-1)
            for t, token in enumerate(said):
                advantage = float(scores[index]) - float(rollout.values[index, t])
                total = total - advantage * chances[len(one.ids) - 1 + t, token]
                tokens += 1
    (total / tokens).backward()
    for name, weight in roles.policy.named_parameters():
        if ".default." in name:
            assert torch.allclose(ours[name], weight.grad, rtol=1e-3, atol=1e-6), name
            assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_first_gradient_of_a_group_is_the_one_worked_out_by_hand(
    place: Path, tmp_path: Path, algorithm: str
) -> None:
    """No value function: -mean(A * log p), A from the prompt's other answers; the price of KL where each has it."""
    beta, size = 0.3, 3
    stage = Known(
        settings_of(
            place, algorithm=algorithm, group_size=size, batch_size=2, minibatch_size=6, ppo_epochs=1,
            max_new_tokens=6, kl_coefficient=beta, normalise_scores=False, missing_end_penalty=0.0,
        ),
        wanted_share,
    )  # fmt: skip
    roles = roles_of(stage)
    assert roles.value_head is None and not any(".value." in name for name, _ in roles.named_parameters())
    for name, weight in roles.policy.named_parameters():  # a policy that is not the reference
        if "lora_B" in name and ".default." in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(1))
    trainer = trainer_of(stage, roles, tmp_path)
    with attention.for_batches(roles, stage.padding_free):
        rollout = trainer.roll_out(roles, stage.data.training[:2])
        scores = wanted_share(None, rollout.texts, rollout.answers)
        advantages, returns = trainer._advantages(torch.tensor(scores), rollout)
        for loss, _ in trainer.minibatch_losses(roles, rollout, range(6), advantages, returns):
            loss.backward()
    assert returns is None and len(rollout.answers) == 6
    assert [one.ids for one in rollout.asked[:size]] == [stage.data.training[0].ids] * size
    assert len(set(map(tuple, rollout.answers[:size]))) > 1  # draws of their own
    ours = {n: w.grad.clone() for n, w in roles.policy.named_parameters() if ".default." in n}

    roles.zero_grad()
    plain = AutoModelForCausalLM.from_pretrained(place / "model").eval()

    def chances(model, ids: list[int], said: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([ids + said])).logits[0].log_softmax(-1)
        return torch.stack([logits[len(ids) - 1 + t, token] for t, token in enumerate(said)])

    rows = [(one.ids, said) for one, said in zip(rollout.asked, rollout.answers, strict=True)]
    with torch.no_grad():
        theirs = [chances(plain, *row) for row in rows]
    with attention.for_batches(roles, False):
        logp = [chances(roles.policy, *row) for row in rows]
    total = 0.0
    for index in range(6):
        group = range(index // size * size, index // size * size + size)
        if algorithm == "rloo":
            paid = [scores[i] - beta * float((logp[i].detach() - theirs[i]).sum()) for i in range(6)]
            advantage = paid[index] - sum(paid[i] for i in group if i != index) / (size - 1)
        else:
            mean = sum(scores[i] for i in group) / size
            spread = (sum((scores[i] - mean) ** 2 for i in group) / (size - 1)) ** 0.5
            advantage = (scores[index] - mean) / (spread + 1e-4)
            total = (
                total + beta * ((theirs[index] - logp[index]).exp() - 1 - theirs[index] + logp[index]).sum()
            )
        total = total - advantage * logp[index].sum()
    (total / sum(map(len, rollout.answers))).backward()
    for name, weight in roles.policy.named_parameters():
        if ".default." in name:
            assert torch.allclose(ours[name], weight.grad, rtol=1e-3, atol=1e-6), name
            assert weight.grad.abs().max() > 0


def test_one_answer_to_every_prompt_ends_the_run(place: Path, tmp_path: Path) -> None:
    stage = Known(settings_of(place, batch_size=6, minibatch_size=6, max_new_tokens=4), wanted_share)
    roles = roles_of(stage)
    trainer = trainer_of(stage, roles, tmp_path)
    with attention.for_batches(roles, stage.padding_free):
        rollout = trainer.roll_out(roles, stage.data.training[:6])
    same = replace(rollout, answers=[rollout.answers[0]] * 6)
    scores = torch.zeros(6)
    for one in (same, same, rollout, same, same):  # never three times running
        trainer._check(scores, one)
    with pytest.raises(TrainingFailed, match="the same answer since step"):
        trainer._check(scores, same)


def test_a_kl_above_its_limit_ends_the_run(place: Path, tmp_path: Path) -> None:
    settings = settings_of(
        place, max_steps=20, batch_size=8, minibatch_size=4, max_new_tokens=4, learning_rate=1e-1,
        kl_limit=0.5, eval_fraction=0.0, output_dir=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(TrainingFailed, match="KL to the start reached"):
        run(Known(settings, wanted_share), Observer())


def test_values_belong_to_the_position_before_the_token(place: Path) -> None:
    stage = Known(settings_of(place, max_new_tokens=5), wanted_share)
    roles = roles_of(stage)
    torch.nn.init.normal_(roles.value_head.weight, std=1.0)
    asked = stage.data.training[:3]
    with attention.for_batches(roles, stage.padding_free):
        answers = draw(stage._backend(roles), asked, 4, range(len(asked)))
        rollout = look_back(roles, asked, answers, stage._lay, temperature=1.0, batch_size=2)
    for index, one in enumerate(asked):
        said = rollout.answers[index]
        with torch.no_grad(), roles.acting_as("value") as model:
            hidden = model.get_base_model().base_model(input_ids=torch.tensor([one.ids + said]))[0][0]
        expected = (hidden @ roles.value_head.weight[0])[len(one.ids) - 1 : len(one.ids) + len(said) - 1]
        assert rollout.values[index, : len(said)].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_only_policy_and_value_learn_and_roles_do_not_mix(place: Path) -> None:
    stage = Known(settings_of(place), wanted_share)
    roles = roles_of(stage)
    names = {name for name, weight in roles.named_parameters() if weight.requires_grad}
    assert names == {
        name
        for name, _ in roles.named_parameters()
        if ".default." in name or ".value." in name or name.startswith("value_head.")
    }
    batch = stage._lay([[5, 6, 7, 8]])
    with torch.no_grad(), attention.for_batches(roles, stage.padding_free):
        before = {role: roles.hidden(role, batch) for role in ("policy", "reference", "value")}
        for name, weight in roles.named_parameters():
            if "lora_B" in name and ".default." in name:
                weight.normal_(std=0.1)
        after = {role: roles.hidden(role, batch) for role in ("policy", "reference", "value")}
    assert not torch.allclose(before["policy"], after["policy"])
    assert torch.equal(before["reference"], after["reference"])
    assert torch.equal(before["value"], after["value"])
    assert {name for name, weight in roles.named_parameters() if weight.requires_grad} == names
