"""PPO, RLOO and GRPO on the shared training loop: a step draws answers, scores them and makes all updates on them.

PPO follows Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", with these departures: the value
function is an adapter over the policy's base, scores are normalised by their running mean and standard deviation, the
value function's last layer moves with these (Pop-Art), and an answer without an end loses a penalty instead of getting
a fixed score. RLOO (Ahmadian et al. 2024) has the price of KL in the reward and
compares with the prompt's other answers; GRPO (Shao et al. 2024) has it in the loss, as k3. Both have PPO's clipped
loss as a mean over tokens, and no value function.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from medicalgpt_cli.engine.evaluation.statistics import distinct_n, pearson
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.rewards.sources import WeightedReward
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.engine.training import shares, together
from medicalgpt_cli.engine.training.ppo import mathematics
from medicalgpt_cli.engine.training.ppo.mathematics import AdaptiveKL, FixedKL, RunningMoments
from medicalgpt_cli.engine.training.ppo.roles import Roles
from medicalgpt_cli.engine.training.ppo.rollout import (
    Asked,
    Rollout,
    draw,
    look_back,
    prepared,
    spread,
    values_of,
)
from medicalgpt_cli.engine.training.trainer import MedgptTrainer
from medicalgpt_cli.errors import TrainingFailed
from medicalgpt_cli.settings.stages import RlSettings

_WEIGHTS, _STATE = "learning.safetensors", "ppo.json"
_ALIKE = 3  # batches in a row in which every prompt gets the same answer
_MANY_CLIPPED = 0.1  # share of a step's scores
_MANY_ALIKE = 0.5  # share of a step's prompts
_MANY_CUT = 0.9  # share of a step's answers


@dataclass(frozen=True)
class GradientStep:
    """A minibatch, of which each process and pass has a part."""

    weights: torch.Tensor  # (answers of the rollout, longest): what each token counts in the policy's loss
    tokens: torch.Tensor  # how many tokens its answers have


class PPOTrainer(MedgptTrainer):
    unit = "answers"

    def __init__(
        self,
        *,
        reward: WeightedReward,
        backend: LocalBackend,
        lay: Callable[[Sequence[Sequence[int]]], dict[str, torch.Tensor]],
        observer: Observer,
        **options: Any,
    ):
        settings: RlSettings = options["settings"]
        self.rl, self.reward, self.backend, self.lay = settings, reward, backend, lay
        self.observer, self.warned = observer, set[str]()
        if settings.kl_target is None:
            self.price: FixedKL = FixedKL(settings.kl_coefficient)
        else:
            self.price = AdaptiveKL(settings.kl_coefficient, settings.kl_target, settings.kl_horizon)
        self.moments = RunningMoments()
        self.has_started_values = False
        self.clips_apart = False
        self.alike = 0
        self.measures: list[dict[str, float]] = []  # of the steps since the last log step
        super().__init__(**options)

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        """`--optimizer` over policy and value function, each with its own learning rate."""
        if self.optimizer is None:
            roles: Roles = self.model
            groups = [{"params": roles.learning["policy"], "lr": self.args.learning_rate}]
            if roles.learning["value"]:
                groups.append({"params": roles.learning["value"], "lr": self.rl.value_learning_rate})
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **{**options, "weight_decay": self.args.weight_decay})
        return self.optimizer

    # -- a step ------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Draw, score and learn. The last gradient step is left to the loop that calls this."""
        roles: Roles = self.accelerator.unwrap_model(model)
        roles.eval()
        rollout = self.roll_out(roles, inputs["asked"])
        # On the processor: not every accelerator has float64.
        scores = torch.tensor(
            self.reward([one.prompt for one in rollout.asked], rollout.said, rollout.answers),
            dtype=torch.float64,
        )
        self._check(scores, rollout)
        shaped, clipped = self._shaped(roles, scores, rollout)
        advantages, returns = self._advantages(shaped, rollout)
        with roles.recomputing() if self.rl.gradient_checkpointing else nullcontext():
            totals = self._learn(roles, rollout, advantages, returns)
        self.seen += len(rollout.asked)
        figures = {
            **self._figures(scores, shaped, rollout),
            "score_clip_fraction": clipped,
            **self._watch_for_nothing(scores, rollout),
        }
        if returns is not None:
            variance = mathematics.explained_variance(rollout.values, returns, rollout.mask)
            figures["explained_variance"] = 0.0 if variance is None else variance
        self.measures.append({**figures, **totals})
        self.price.update(float(rollout.kl().mean()), len(rollout.asked))
        return torch.tensor(totals["policy_loss"], device=self.args.device)

    def roll_out(self, roles: Roles, asked: Sequence[Asked]) -> Rollout:
        """Answers of the policy to a batch of prompts; the draw depends on seed and step only."""
        asked = [one for one in asked for _ in range(self.rl.answers_a_prompt)]
        first = self.state.global_step * self.rl.batch_size * processes.size() * self.rl.answers_a_prompt
        mine = together.share(list(range(len(asked))))
        answers = draw(
            self.backend, [asked[i] for i in mine], self.rl.rollout_size, [first + i for i in mine]
        )
        return look_back(
            roles,
            asked,
            answers,
            self.lay,
            temperature=self.rl.temperature,
            batch_size=self.rl.answers_a_pass,
        )

    def _share(self, examples: list[Any]) -> dict[str, Any]:
        """Every process knows all prompts of a step; the answers are drawn and looked at in shares (`roll_out`)."""
        return self.data_collator(examples)

    def _shaped(self, roles: Roles, scores: torch.Tensor, rollout: Rollout) -> tuple[torch.Tensor, float]:
        """The scores that are learnt from, (answers,), and the share of them that was clipped.

        Several rewards are normalised as their sum: their weights then say what each of them counts, and a rule that
        every answer meets adds nothing. The penalty for an answer without an end is in units of the normalised score.
        """
        before = dataclasses.replace(self.moments)
        if self.rl.normalise_scores:
            self.moments.update(scores)
            scores = mathematics.normalise(scores, self.moments)
        if roles.value_head is not None:
            self._move_values(roles, rollout, before)
        clipped = mathematics.score_clip_fraction(scores, self.rl.score_clip)
        self._warn_of_clipped(clipped)
        held = mathematics.score_clip(scores, self.rl.score_clip).to(rollout.logp)
        return mathematics.missing_end_penalty(held, rollout.ended, self.rl.missing_end_penalty), clipped

    def _move_values(self, roles: Roles, rollout: Rollout, before: RunningMoments) -> None:
        """Keep the value function in the units of the scores that are learnt from; `rollout.values` with it."""
        if not self.has_started_values:
            self.has_started_values = not self.rl.normalise_scores or self.moments.spread is not None
            if self.has_started_values:
                self._start_values(roles, rollout)
            return
        scale, shift = mathematics.change_of_units(before, self.moments)
        if (scale, shift) != (1.0, 0.0):
            weight, bias = self._value_head(roles)
            self._set_value_head(roles, weight * scale, bias * scale + shift)
            rollout.values = (rollout.values * scale + shift) * rollout.mask

    def _start_values(self, roles: Roles, rollout: Rollout) -> None:
        """Let the value function predict what the reward model's score is worth in the units that are learnt from.

        It begins at 0, the mean of normalised scores, and waits there until these have a spread: a head in the reward
        model's own units would be off by the level of its scores.
        """
        scale, shift = self.rl.reward_weight, 0.0
        if self.rl.normalise_scores:
            scores = self.reward.last.get("reward model", [0.0])
            scale /= self.moments.spread
            shift = -scale * sum(scores) / len(scores)
        head = roles.head_from_reward_model(scale, shift)
        if head is None:
            return
        self._set_value_head(roles, *head)
        rollout.values = values_of(
            roles, rollout.asked, rollout.answers, self.lay, batch_size=self.rl.answers_a_pass
        )

    def _value_head(self, roles: Roles) -> list[torch.Tensor]:
        """Weight and bias in all their digits: DeepSpeed may compute with fewer."""
        found = [roles.value_head.weight, roles.value_head.bias]
        return [shares.get_weight(one, self.optimizer) if self.spread else one.detach() for one in found]

    def _set_value_head(self, roles: Roles, weight: torch.Tensor, bias: torch.Tensor) -> None:
        for parameter, value in ((roles.value_head.weight, weight), (roles.value_head.bias, bias)):
            if self.spread:
                shares.set_weight(parameter, value, self.optimizer)
            else:
                parameter.data.copy_(value)

    def _warn_of_clipped(self, clipped: float) -> None:
        if clipped < _MANY_CLIPPED:
            return
        how = "" if self.rl.normalise_scores else ", which are not normalised"
        self._warn_once(
            "clipped",
            f"{clipped:.0%} of the scores{how}, lie beyond --score-clip {self.rl.score_clip:g}: what is clipped to "
            "one number cannot be told apart",
        )

    def _watch_for_nothing(self, scores: torch.Tensor, rollout: Rollout) -> dict[str, float]:
        """Warn of answers that teach nothing: all to a prompt, or all of a rollout of ppo, have one reward."""
        cut = 1 - float(rollout.ended.double().mean())
        if cut >= _MANY_CUT:
            who = "every answer was" if cut == 1 else f"{cut:.0%} of the answers were"
            self._warn_once("cut", f"{who} cut off at --max-new-tokens {self.rl.max_new_tokens}")
        # A penalty that only some of them got tells equal scores apart.
        penalty = self.rl.missing_end_penalty * ~rollout.ended.cpu()
        each = self.rl.answers_a_prompt
        size = each if each > 1 else len(scores)
        same = mathematics.alike(scores, size) & mathematics.alike(penalty.double(), size)
        share = float(same.double().mean())
        if each == 1:
            if len(scores) > 1 and share:
                self._warn_once("alike", "every answer got the same reward: nothing is learnt from it")
            return {}
        if share >= _MANY_ALIKE:
            self._warn_once(
                "alike",
                f"{share:.0%} of the prompts got one reward for all their answers: nothing is learnt from these "
                "(easier prompts, a larger --group-size or a reward that tells answers apart would)",
            )
        return {"frac_reward_zero_std": share}

    def _warn_once(self, what: str, text: str) -> None:
        """A warning that would come with every step comes with the first."""
        if what not in self.warned and processes.rank() == 0:
            self.observer.on_warning(f"step {self.state.global_step + 1}: {text}")
        self.warned.add(what)

    def _advantages(self, shaped: torch.Tensor, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Advantages and, where there is a value function, returns: both (answers, longest), 0 at padding."""
        if self.rl.algorithm == "ppo":
            rewards = mathematics.token_rewards(
                shaped, rollout.logp, rollout.ref_logp, rollout.mask, self.price.coefficient
            )
            advantages, returns = mathematics.gae(
                rewards, rollout.values, rollout.mask, self.rl.gamma, self.rl.gae_lambda
            )
            return mathematics.whiten(advantages, rollout.mask), returns
        if self.rl.algorithm == "rloo":
            rewards = shaped - self.price.coefficient * rollout.kl()
            of_answers = mathematics.rloo_advantages(rewards, self.rl.group_size)
        else:
            of_answers = mathematics.group_advantages(shaped, self.rl.group_size, self.rl.scale_advantages)
        return of_answers[:, None] * rollout.mask, None

    def _learn(
        self, roles: Roles, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor | None
    ) -> dict[str, float]:
        """All gradient steps on a rollout; the means of what they measured."""
        self._clip_apart_from_now_on()
        generator = torch.Generator().manual_seed(self.rl.seed * 1_000_003 + self.state.global_step)
        batches = [
            piece.tolist()
            for _ in range(self.rl.ppo_epochs)
            for piece in torch.randperm(len(rollout.asked), generator=generator).split(self.rl.minibatch_size)
        ]
        totals: dict[str, float] = {}
        for number, chosen in enumerate(batches, 1):
            parts, step = self._micro_batches(chosen), self._gradient_step(rollout, chosen)
            for part in parts:
                # One that has no answers counts for nothing: DeepSpeed adds gradients up in the order in which they
                # come, so that every process has to come by the same ones.
                share = 1.0 if part else 0.0
                losses = self.minibatch_losses(roles, rollout, part or chosen[:1], advantages, returns, step)
                for which, (loss, measured) in enumerate(losses, 1):
                    if not torch.isfinite(loss):
                        raise TrainingFailed(
                            f"the loss became {float(loss)} at step {self.state.global_step + 1}",
                            "lower --learning-rate, or raise --kl-coefficient",
                        )
                    is_last = part is parts[-1] and which == (1 if returns is None else 2)
                    self._backward(loss * share, last=is_last)
                    for name, value in measured.items():
                        totals[name] = totals.get(name, 0.0) + value * share / len(batches)
            if not self.spread:
                together.sum_gradients([*roles.learning["policy"], *roles.learning["value"]])
                if number < len(batches):  # the last one is made by the loop, which also counts it
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        parts = together.from_all(totals)
        return {name: sum(part[name] for part in parts) for name in totals}

    def _clip_apart_from_now_on(self) -> None:
        """Let the optimizer clip before each step: the loop's own steps, ours and DeepSpeed's go through it alike."""
        if not self.clips_apart:
            shares.inner_optimizer(self.optimizer).register_step_pre_hook(self._clip)
            self.clips_apart = True

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Hold the gradient of the policy and that of the value function within --max-grad-norm, each by its own norm.

        By a common norm the value function's errors, which are large while it begins to learn, would shrink the
        policy's steps. DeepSpeed hands over the groups one by one, and of each the part that this process keeps.
        """
        for group in optimizer.param_groups:
            gradients = [weight.grad for weight in group["params"] if weight.grad is not None]
            squares = sum(float(torch.linalg.vector_norm(one)) ** 2 for one in gradients)
            if self.spread:
                squares = together.total(squares, self.args.device)
            too_large = math.sqrt(squares) / self.rl.max_grad_norm
            if too_large > 1:
                for one in gradients:
                    one.div_(too_large)

    def _micro_batches(self, chosen: list[int]) -> list[list[int]]:
        """This process' part of a minibatch in pieces of the micro-batch's size, as many in every process."""
        size, mine = self.rl.answers_a_pass, together.share(chosen)
        most = -(-len(chosen) // processes.size())
        return [mine[start : start + size] for start in range(0, most, size)]

    def _backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of a part of a minibatch's loss. DeepSpeed makes the gradient step with the last one."""
        if not self.spread:
            self.accelerator.backward(loss)
            return
        self.accelerator.gradient_state._set_sync_gradients(last)
        # It takes the mean over the processes, and the loss is this one's part of a sum.
        self.accelerator.backward(loss * processes.size(), scale_wrt_gas=False)

    def _gradient_step(self, rollout: Rollout, chosen: Sequence[int]) -> GradientStep:
        """What the answers of a gradient step count: with --mask-truncated those that were cut off nothing."""
        mask = rollout.mask[list(chosen)]
        learnt = mask & rollout.ended[list(chosen), None] if self.rl.mask_truncated else mask
        weights = torch.zeros_like(rollout.logp)
        weights[list(chosen)] = mathematics.token_weights(
            learnt, self.rl.loss_normalisation or "token", self.rl.max_new_tokens
        ).to(weights)
        return GradientStep(weights, mask.sum())

    def minibatch_losses(
        self,
        roles: Roles,
        rollout: Rollout,
        chosen: Sequence[int],
        advantages: torch.Tensor,
        returns: torch.Tensor | None,
        step: GradientStep | None = None,
    ) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        """The clipped losses of some answers of a rollout, with gradient, and what they measure.

        First the policy's, then the value function's. They have no weight in common: taking the gradient of one
        before the other is computed keeps one set of activations at a time.

        Args:
            step: the whole gradient step that they are a part of, whose parts' losses and measures add up to its
                own; not given, they are all of it.
        """
        prompts = [rollout.asked[index].ids for index in chosen]
        answers = [rollout.answers[index] for index in chosen]
        batch, positions, tokens = prepared(prompts, answers, self.lay, rollout.mask.device)
        pick = torch.tensor(list(chosen), device=rollout.mask.device)
        mask = rollout.mask[pick]
        step = step or self._gradient_step(rollout, chosen)
        where = positions, tokens, self.rl.temperature
        logp, entropy = roles.log_probabilities(
            "policy", batch, *where, entropy=self.rl.entropy_coefficient > 0
        )
        yield self._policy_part(logp, entropy, mask, step, rollout, pick, advantages[pick])
        if returns is None:
            return
        del logp, entropy
        with roles.acting_as("value"):
            values = spread(roles.values(batch, positions), mask)
            loss, measured = mathematics.value_loss(
                values, rollout.values[pick], returns[pick], mask, self.rl.clip_range_value, step.tokens
            )
            figures = {
                "value_loss": float(loss.detach()),
                "value_clip_fraction": float(measured["clip_fraction"]),
            }
            yield self.rl.value_coefficient * loss, figures

    def _policy_part(
        self,
        logp: torch.Tensor,
        entropy: torch.Tensor | None,
        mask: torch.Tensor,
        step: GradientStep,
        rollout: Rollout,
        pick: torch.Tensor,
        advantages: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The policy's loss and what it measures, of the answers' tokens: log p and entropy, (tokens,)."""
        logp, weights = spread(logp, mask), step.weights[pick]
        loss, measured = mathematics.policy_loss(
            logp,
            rollout.logp[pick],
            advantages,
            mask,
            self.rl.clip_range,
            step.tokens,
            weights=weights,
            clip_range_high=self.rl.clip_range_high,
            of_sequences=self.rl.importance_sampling_level == "sequence",
        )
        figures = {
            "policy_loss": float(loss.detach()),
            "approx_kl": float(measured["approx_kl"]),
            "clip_fraction": float(measured["clip_fraction"]),
        }
        if self.rl.algorithm == "grpo":
            kl = mathematics.kl_k3(logp, rollout.ref_logp[pick], mask)
            loss = loss + self.price.coefficient * mathematics.weighted_sum(kl, mask, weights)
        if entropy is not None:
            uncertainty = mathematics.weighted_sum(spread(entropy, mask), mask, weights)
            loss = loss - self.rl.entropy_coefficient * uncertainty
        return loss, figures

    # -- what is watched ---------------------------------------------------------------------------------------

    def _figures(self, scores: torch.Tensor, shaped: torch.Tensor, rollout: Rollout) -> dict[str, float]:
        lengths = rollout.lengths
        distinct = distinct_n(rollout.answers, 2)
        with_length = pearson(scores.tolist(), lengths)
        return {
            "reward": float(scores.mean()),
            **self.reward.means(),
            "reward_shaped": float(shaped.mean()),
            "kl": float(rollout.kl().mean()),
            "kl_k3": float(mathematics.kl_k3(rollout.logp, rollout.ref_logp, rollout.mask).sum(1).mean()),
            "kl_per_token": rollout.kl_per_token(),
            "kl_coefficient": self.price.coefficient,
            "entropy": float(mathematics.masked_mean(rollout.entropy, rollout.mask)),
            "answer_tokens": sum(lengths) / len(lengths),
            "ended": float(rollout.ended.float().mean()),
            "distinct_2": 0.0 if distinct is None else distinct,
            "reward_length_correlation": 0.0 if with_length is None else with_length,
        }

    def _check(self, scores: torch.Tensor, rollout: Rollout) -> None:
        """Stop with a word where learning has gone wrong.

        Raises:
            TrainingFailed: a score is no number, the KL has blown up, or all answers have become one.
        """
        step = self.state.global_step + 1
        if not torch.isfinite(scores).all() or not torch.isfinite(rollout.logp).all():
            raise TrainingFailed(f"a score or probability is no number at step {step}", self._last_good())
        kl = rollout.kl_per_token()
        if kl > self.rl.kl_limit:
            raise TrainingFailed(
                f"the KL to the start reached {kl:.2f} nats a token at step {step} (--kl-limit {self.rl.kl_limit:g})",
                f"raise --kl-coefficient or lower --learning-rate; {self._last_good()}",
            )
        different_prompts = len({tuple(one.ids) for one in rollout.asked})
        self.alike = (
            self.alike + 1 if different_prompts > 3 and len(set(map(tuple, rollout.answers))) == 1 else 0
        )
        if self.alike >= _ALIKE:
            raise TrainingFailed(
                f"every prompt gets the same answer since step {step - _ALIKE + 1}",
                f"look at the reward, raise --kl-coefficient; {self._last_good()}",
            )

    def _last_good(self) -> str:
        from medicalgpt_cli.engine.run import checkpoints

        newest = checkpoints.newest_complete(self.checkpoint_folder)
        return f"the last good checkpoint is {newest}" if newest else "no checkpoint was written yet"

    def log(self, logs, start_time=None):
        if "loss" in logs and self.measures:
            steps, self.measures = self.measures, []
            logs |= {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        super().log(logs, start_time)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What learns, the price of KL and the moments of the scores. Optimizer and random state are the loop's."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._learning(), folder / _WEIGHTS)
        self._save_state(folder)

    def _save_state(self, folder: Path) -> None:
        state = {
            "price": self.price.state_dict(),
            "moments": self.moments.state_dict(),
            "has_started_values": self.has_started_values,
            "alike": self.alike,
        }
        (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")

    def _learning(self) -> dict[str, torch.Tensor]:
        return {
            name: weight.detach().cpu().contiguous()
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        saved = load_file(folder / _WEIGHTS)
        ours = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        if saved.keys() != ours.keys():
            raise TrainingFailed(f"{folder} holds another model", "start a new run")
        with torch.no_grad():
            for name, weight in ours.items():
                weight.copy_(saved[name])
        self._load_state(folder)

    def _load_state(self, folder: Path) -> None:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self.price.load_state_dict(state["price"])
        self.moments.load_state_dict(state["moments"])
        self.has_started_values = state["has_started_values"]
        self.alike = state["alike"]
