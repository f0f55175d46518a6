"""Reinforcement learning: prompts answered, answers scored, the policy moved towards what scores well."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from medicalgpt_cli.engine.data.mixing import passes_over
from medicalgpt_cli.engine.evaluation.paired import per_answer
from medicalgpt_cli.engine.evaluation.statistics import wilson_interval
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.model.loading import choose_device, choose_dtype, load_tokenizer
from medicalgpt_cli.engine.model.positions import positions
from medicalgpt_cli.engine.model.quantization import check_quantization
from medicalgpt_cli.engine.model.references import ResolvedModel, resolve_models
from medicalgpt_cli.engine.model.reward_model import check_head, load_reward_model, read_record
from medicalgpt_cli.engine.model.tokenizer import fingerprint
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.planning.batches import Item
from medicalgpt_cli.engine.planning.needs import Case, largest_batch, needs
from medicalgpt_cli.engine.rewards.sources import (
    Reward,
    WeightedReward,
    model_reward,
    rule_rewards,
    separate_scorer,
)
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.engine.run.folder import RunFolder
from medicalgpt_cli.engine.training import attention, together
from medicalgpt_cli.engine.training.batches import EpochSampler, ExampleDataset
from medicalgpt_cli.engine.training.callbacks import StopOnSignal
from medicalgpt_cli.engine.training.loop import Stage
from medicalgpt_cli.engine.training.ppo.mathematics import SINGLE_PRECISION
from medicalgpt_cli.engine.training.ppo.roles import Roles, shares_base
from medicalgpt_cli.engine.training.ppo.rollout import draw, look_back
from medicalgpt_cli.engine.training.ppo.trainer import PPOTrainer
from medicalgpt_cli.engine.training.reward_data import laid_end_to_end, padded_right
from medicalgpt_cli.engine.training.rl_data import RlData, load_rl_data
from medicalgpt_cli.engine.training.trainer_args import learning_rate
from medicalgpt_cli.engine.training.tuning import load_trainable, save_result
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.groups import ModelSettings, SamplingSettings
from medicalgpt_cli.settings.stages import RlSettings, TrainSettings

_UNPLANNED = 8  # answers of a pass where it is not known what a model needs
_HELD_OUT_NUMBERS = 10**12  # draws on held-out prompts never meet those of training


class RlStage(Stage):
    name = "rl"
    trainer = PPOTrainer
    # Drawing, policy and value function leave holes into which the next one's tensors do not fit: 1.2 GiB of 4.4 on
    # SmolLM2. Giving theirs back costs a fourteenth of the time.
    kept_tensor = 2 * 2**20
    settings: RlSettings
    data: RlData
    answers: list[str]  # of the last measure

    # -- before weights ----------------------------------------------------------------------------------------

    def complete(self, settings: TrainSettings) -> TrainSettings:
        assert isinstance(settings, RlSettings)
        count = max(settings.wanted_processes, processes.size())  # torchrun says how many
        return settings.completed(count, learning_rate(settings, settings))

    def resolve(self) -> ResolvedModel:
        resolved = resolve_models(self.settings)
        self.reward_resolved: ResolvedModel | None = None
        if self.settings.reward_model:
            self.reward_resolved = resolve_models(self._reward_settings())
            check_head(self.reward_resolved.adapter or self.reward_resolved.base)
            check_quantization(self.reward_resolved, self.settings.quantization)
        return resolved

    def models(self) -> dict[str, ResolvedModel]:
        reward = self.reward_resolved
        return {**super().models(), **({"reward_model_": reward} if reward else {})}

    def tokenizers(self) -> dict[str, str]:
        reward = self.reward_tokenizer
        return {
            **super().tokenizers(),
            **({"reward model's tokenizer": fingerprint(reward)} if reward else {}),
        }

    def _reward_settings(self) -> ModelSettings:
        settings = self.settings
        return ModelSettings(
            base_model=settings.reward_model,
            use_cpu=settings.use_cpu,
            gpus=settings.gpus,
            dtype=settings.dtype,
        )

    def load_data(self, observer: Observer) -> RlData:
        self.reward_tokenizer = None
        seen: list[str] = []
        if self.reward_resolved is not None:
            self.reward_tokenizer = load_tokenizer(self._reward_settings(), self.reward_resolved, observer)
            record = read_record(self.reward_resolved.adapter or self.reward_resolved.base)
            seen = record.get("trained_on", [])
        data = load_rl_data(self.settings, self.tokenizer, frozenset(seen), self._context(), observer)
        if len(data.training) < self.rollout_prompts:
            observer.on_notice(
                f"the {len(data.training):,} prompts are fewer than a rollout of {self.rollout_prompts:,}: "
                "each has all of them"
            )
        return data

    @property
    def rollout_prompts(self) -> int:
        """Prompts of a rollout, of all processes together."""
        return self.settings.batch_size * max(self.settings.wanted_processes, processes.size())

    def _context(self) -> int:
        limit = self.tokenizer.model_max_length
        return limit if limit < 10**6 else 10**6

    @property
    def examples(self) -> int:
        return len(self.data.mix)

    @property
    def has_held_out(self) -> bool:
        return bool(self.data.held_out)

    def facts(self) -> dict[str, Any]:
        """Prompts, and the answers of the whole run."""
        names = ("value_learning_rate", "gae_lambda") if self.settings.algorithm == "ppo" else ("group_size",)
        return {
            "prompts": len(self.data.training),
            **passes_over(self.data.mix.rows, self.schedule.updates / self.schedule.updates_per_epoch),
            "held_out_prompts": len(self.data.held_out),
            "algorithm": self.settings.algorithm,
            "rollout_prompts": self.rollout_prompts,
            "minibatch": self.settings.minibatch_size,
            **{name: getattr(self.settings, name) for name in names},
            "answers": self.schedule.updates
            * min(self.settings.batch_size * processes.size(), self.examples)
            * self.settings.answers_a_prompt,
            "reward": ", ".join(
                [
                    *([str(self.settings.reward_model)] if self.reward_resolved else []),
                    *self.settings.reward_rule,
                ]
            ),
        }

    def fitted(self, case: Case | None, have: int | None) -> Case | None:
        """Where --micro-batch-size is not given: a process' part of a minibatch, or as much of it as fits."""
        if self.settings.micro_batch_size is not None:
            return case
        size = self.settings.answers_a_pass
        if case is None:
            size = min(size, _UNPLANNED)
        elif have is not None and needs(case)["peak"] > have:
            size = min(largest_batch(case, have) or 1, size)
            case = case.with_batch(size)
        self.settings = replace(self.settings, micro_batch_size=size)
        return case

    def agree(self, device: torch.device) -> None:
        if self.settings.micro_batch_size is not None:
            smallest = -together.largest(-self.settings.micro_batch_size, device)
            self.settings = replace(self.settings, micro_batch_size=smallest)

    # -- model and rewards -------------------------------------------------------------------------------------

    def load(self, observer: Observer) -> Roles:
        self.observer = observer
        policy = load_trainable(self.settings, self.resolved, observer)
        shared = self.reward_resolved is not None and shares_base(self.resolved, self.reward_resolved)
        torch.manual_seed(self.settings.seed)
        roles = Roles(
            policy,
            has_reference=self.resolved.adapter is not None,
            reward=self.reward_resolved.adapter if shared else None,
            has_value=self.settings.algorithm == "ppo",
        )
        if self.settings.gradient_checkpointing and not roles.can_recompute:
            raise UsageError(
                f"--gradient-checkpointing: the layers of {self.resolved.label} cannot be computed anew",
                "leave it out and take a smaller --micro-batch-size",
            )
        self.rewards = self._rewards(roles, shared, observer)
        return roles

    def _rewards(self, roles: Roles, shared: bool, observer: Observer) -> Reward:
        parts = rule_rewards(self.settings)
        if self.reward_resolved is not None:
            if shared:
                scorer, most = self._shared_scorer(roles), positions(roles.policy)
            else:
                scorer, most = self._separate_scorer()
            context = min(self._context(), most or self._context())
            reward = model_reward(scorer, self.reward_tokenizer, context)
            parts = {"reward model": (self.settings.reward_weight, reward), **parts}
            observer.on_notice(
                "all roles share one copy of the base weights"
                if shared
                else "the reward model has weights of its own"
            )
        return WeightedReward(parts)

    def _shared_scorer(self, roles: Roles) -> Any:
        def score(rows: list[list[int]]) -> list[float]:
            found = [0.0] * len(rows)
            order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
            device = roles.device
            size = self.settings.answers_a_pass
            with attention.for_batches(roles.policy, self.padding_free):
                for start in range(0, len(order), size):
                    piece = order[start : start + size]
                    batch = self._lay([rows[index] for index in piece])
                    batch = {name: value.to(device) for name, value in batch.items()}
                    for index, one in zip(piece, roles.scores(batch), strict=True):
                        found[index] = one
            return found

        return score

    def _separate_scorer(self) -> tuple[Any, int | None]:
        """What scores, and how many tokens it can read."""
        device = choose_device(self.settings)
        dtype = choose_dtype(self.settings, device)
        model = load_reward_model(self.reward_resolved, dtype, device, self.settings.quantization)
        scorer = separate_scorer(
            model, attention.is_exact(model), self.reward_tokenizer.pad_token_id, self.settings.answers_a_pass
        )
        return scorer, positions(model)

    def keeps_apart(self, model: Roles, observer: Observer) -> bool:
        return super().keeps_apart(model.policy, observer)

    @property
    def _lay(self) -> Any:
        return (
            laid_end_to_end
            if self.padding_free
            else partial(padded_right, pad_id=self.tokenizer.pad_token_id)
        )

    def _backend(self, roles: Roles) -> LocalBackend:
        sampling = SamplingSettings(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            seed=self.settings.seed,
            thinking=self.settings.thinking,
        )
        return LocalBackend(roles.policy, self.tokenizer, sampling, self.observer)

    def batch_items(self) -> list[Item]:
        """Prompts with answers of full length."""
        new = self.settings.max_new_tokens
        return [Item((len(one.ids) + new,), new) for one in self.data.training]

    def sampler(self) -> EpochSampler:
        lengths = [0] * len(self.data.training)
        whole = self.settings.batch_size * processes.size()
        draw = self.data.mix.sampler(self.settings.seed)
        return EpochSampler(lengths, whole, self.settings.seed, by_length=False, draw=draw)

    def trainer_parts(self, model: Roles, stop: StopOnSignal) -> dict[str, Any]:
        self.check_rewards(model)
        dataset = ExampleDataset(self.data.training)
        return {
            "train_dataset": dataset,
            "sampler": self.sampler(),
            "collate": lambda asked: {"asked": list(asked)},
            "measure": partial(self._held_out, model),
            "reward": self.rewards,
            "backend": self._backend(model),
            "lay": self._lay,
            "observer": self.observer,
        }

    def check_rewards(self, roles: Roles) -> None:
        """Refuse a reward model that scores everything the same.

        Raises:
            UsageError: it does.
        """
        if self.reward_resolved is None:
            return
        prompts = [one.prompt for one in self.data.training[:8]]
        texts = ["Yes.", "I do not know.", "a b c d e f g", "请及时就医。"]
        scores = [
            self.rewards.parts["reward model"][1](prompts[:1], [text], [[0]])[0] for text in texts
        ] + self.rewards.parts["reward model"][1](prompts, ["Yes."] * len(prompts), [[0]] * len(prompts))
        if max(scores) - min(scores) <= SINGLE_PRECISION * max(map(abs, scores)):
            raise UsageError(
                f"the reward model gives every answer the same score ({scores[0]:.4g})",
                "was its training finished? `medgpt score` shows its scores",
            )

    # -- held out ----------------------------------------------------------------------------------------------

    def _held_out(self, roles: Roles, observer: Observer | None = None) -> dict[str, Any]:
        figures, self.answers = self._answered(roles, observer)
        return figures

    def _answered(self, roles: Roles, observer: Observer | None) -> tuple[dict[str, Any], list[str]]:
        """Reward, KL and length of answers drawn for the held-out prompts, the same draws each time."""
        held, task = self.data.held_out, "answering held-out prompts"
        if observer:
            observer.on_task_start(task, None, "")
        roles.eval()
        with attention.for_batches(roles.policy, self.padding_free):
            numbers = together.share([_HELD_OUT_NUMBERS + index for index in range(len(held))])
            mine = together.share(list(held))
            answers = draw(self._backend(roles), mine, self.settings.rollout_size, numbers)
            rollout = look_back(
                roles,
                held,
                answers,
                self._lay,
                temperature=self.settings.temperature,
                batch_size=self.settings.answers_a_pass,
            )
            rewards = self.rewards([one.prompt for one in held], rollout.said, rollout.answers)
        if observer:
            observer.on_task_end(task)
        of_each = {
            "reward": rewards,
            **self.rewards.per_answer(),
            "kl": rollout.kl().tolist(),
            "answer_tokens": [float(length) for length in rollout.lengths],
            "ended": rollout.ended.float().tolist(),
        }
        self.items_measured = per_answer([one.prompt.hash for one in held], of_each)
        low, high = wilson_interval(sum(of_each["ended"]), len(held))
        return {
            **{name: sum(values) / len(held) for name, values in of_each.items()},
            **self.rewards.intervals(rewards),
            "ended_low": low,
            "ended_high": high,
            "prompts": len(held),
        }, rollout.texts

    def measure(
        self, model: Roles, observer: Observer, known: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if not self.has_held_out:
            return {"metrics": {}, "answers": []}
        figures = known or self._held_out(model, observer)  # known ones come with their answers
        return {"metrics": figures, "answers": self.answers[: self.settings.sample_answers]}

    def compare(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        samples = [
            {"question": asked.prompt.messages[-1]["content"], "before": old, "after": new}
            for asked, old, new in zip(self.data.held_out, before["answers"], after["answers"], strict=False)
        ]
        return {"samples": samples}

    def save(self, model: Roles, folder: RunFolder, after: dict[str, Any]) -> None:
        """The policy alone: one ordinary adapter over the original base."""
        save_result(self.settings, self.resolved, model.policy, self.tokenizer, folder)
