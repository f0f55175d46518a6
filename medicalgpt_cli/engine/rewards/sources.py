"""What an answer is worth: a reward model's score, rules, or a weighted sum of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.examples import render_answer
from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.prompts import Prompt
from medicalgpt_cli.engine.evaluation.preferences import score_rows
from medicalgpt_cli.engine.evaluation.statistics import mean_interval, wilson_interval
from medicalgpt_cli.engine.generation.wire import as_text
from medicalgpt_cli.engine.rewards.rules import answer_format, length_rule, right_option
from medicalgpt_cli.engine.training import together
from medicalgpt_cli.engine.training.reward_data import laid_end_to_end, padded_right
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.stages import RlSettings

# Rules that give 1 or 0 and nothing else.
BINARY = ("right-option", "answer-format")

# An answer: an assistant's turn with what it thought and called, or its text alone.
Said = Message | str
# Prompts, the answers and their token ids (the end token included), to one number each.
Reward = Callable[[Sequence[Prompt], Sequence[Said], Sequence[Sequence[int]]], list[float]]


@dataclass(frozen=True)
class WeightedReward:
    """The sum of named rewards, each with its weight; remembers the parts of the last call.

    All processes of a run call together with the same answers. Each scores its share of them, and all get all scores.
    """

    parts: dict[str, tuple[float, Reward]]
    last: dict[str, list[float]] = field(default_factory=dict)

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Said], tokens: Sequence[Sequence[int]]
    ) -> list[float]:
        total = [0.0] * len(answers)
        mine = [together.share(list(one)) for one in (prompts, answers, tokens)]
        for name, (weight, reward) in self.parts.items():
            self.last[name] = together.in_turn(reward(*mine) if mine[0] else [])
            total = [one + weight * more for one, more in zip(total, self.last[name], strict=True)]
        return total

    def intervals(self, total: Sequence[float]) -> dict[str, float | None]:
        """95 % intervals of the means of the last call: `reward_low`, `reward_high`, and those of each of `means`.

        A rule that gives 0 or 1 is a share and has Wilson's interval, anything else the bootstrap's; None where that
        has no spread.

        Args:
            total: what the last call gave.
        """
        ((first, (weight, _)), *others) = self.parts.items()
        found = _ends("reward", total, weight if first in BINARY and not others else None)
        for name in self._told_apart():
            found |= _ends(f"reward_{_key(name)}", self.last[name], 1.0 if name in BINARY else None)
        return found

    def _told_apart(self) -> list[str]:
        """The parts that have figures of their own: none where they are one."""
        return list(self.last) if len(self.parts) > 1 else []

    def per_answer(self) -> dict[str, list[float]]:
        """What each answer of the last call got by each part, as `means` names them."""
        return {f"reward_{_key(name)}": self.last[name] for name in self._told_apart()}

    def means(self) -> dict[str, float]:
        """The mean of each part of the last call before its weight; none where the parts are one."""
        return {name: sum(one) / len(one) for name, one in self.per_answer().items()}


def _key(name: str) -> str:
    return name.replace(" ", "_")


def _ends(name: str, values: Sequence[float], right: float | None) -> dict[str, float | None]:
    """The interval of one mean. `right`: what every right answer is worth where the others are worth 0."""
    ends: Sequence[float | None] = (None, None)
    if right:
        share = wilson_interval(round(sum(values) / right), len(values))
        ends = sorted(right * end for end in share)
    elif (found := mean_interval(values)) is not None:
        ends = found
    return {f"{name}_low": ends[0], f"{name}_high": ends[1]}


def rule_rewards(settings: RlSettings) -> dict[str, tuple[float, Reward]]:
    """The rewards of `--reward-rule`."""
    rules = {
        "right-option": right_option,
        "answer-format": answer_format,
        "length": length_rule(settings.length_target),
    }
    found: dict[str, tuple[float, Reward]] = {}
    for text in settings.reward_rule:
        name, _, weight = text.partition(":")
        found[name] = (float(weight or 1), partial(_each, rules[name]))
    return found


def _each(
    rule: Callable[[Prompt, str, int], float],
    prompts: Sequence[Prompt],
    answers: Sequence[Said],
    tokens: Sequence[Sequence[int]],
) -> list[float]:
    """A rule looks at the answer and its calls, not at what was thought before."""
    texts = [one if isinstance(one, str) else as_text(one, reasoning=False) for one in answers]
    return [rule(prompt, text, len(said)) for prompt, text, said in zip(prompts, texts, tokens, strict=True)]


def check_keys(settings: RlSettings, prompts: Sequence[Prompt]) -> None:
    """Rules about options need questions with options.

    Raises:
        UsageError: a prompt has none.
    """
    asked = [rule for rule in settings.reward_rule if rule.split(":")[0] in ("right-option", "answer-format")]
    without = next((prompt for prompt in prompts if not prompt.key), None)
    if asked and without is not None:
        raise UsageError(
            f"--reward-rule {asked[0]}: {without.at} has no options and answer",
            "this rule is for multiple-choice questions",
        )


def model_reward(
    score: Callable[..., list[float]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Reward:
    """The reward model's score of each answer, rendered by the reward model's own template.

    It judges the answer and its calls, not the reasoning in front: that is what it was trained on (`records._side`).

    Args:
        score: token rows to scores.
    """

    def reward(
        prompts: Sequence[Prompt], answers: Sequence[Said], tokens: Sequence[Sequence[int]]
    ) -> list[float]:
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = render_answer(tokenizer, prompt.messages, _judged(answer), max_length, prompt.tools)
            if ids is None:
                raise UsageError(
                    f"{prompt.at}: prompt and answer exceed the reward model's {max_length} tokens",
                    "a lower --max-prompt-length or --max-new-tokens",
                )
            rows.append(ids[0] + ids[1])
        return score(rows)

    return reward


def _judged(answer: Said) -> Said:
    return (
        answer if isinstance(answer, str) else {key: one for key, one in answer.items() if key != "reasoning"}
    )


def separate_scorer(model: Any, apart: bool, pad_id: int, batch_size: int) -> Callable[..., list[float]]:
    """Scores by a reward model of its own (full weights, another base, a hub model)."""
    from medicalgpt_cli.engine.training import attention

    lay = laid_end_to_end if apart else partial(padded_right, pad_id=pad_id)

    def score(rows: Sequence[Sequence[int]]) -> list[float]:
        with attention.for_batches(model, apart), torch.no_grad():
            return score_rows(model, rows, lay, batch_size=batch_size) or []

    return score
