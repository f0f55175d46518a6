"""A batch of answers drawn from the policy, with all that PPO needs to know about each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.prompts import Prompt
from medicalgpt_cli.engine.generation.answer_reader import EncodedPrompt
from medicalgpt_cli.engine.generation.batching import batches_by_length
from medicalgpt_cli.engine.generation.decoding import Answer
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.generation.wire import as_text
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.engine.training import together
from medicalgpt_cli.engine.training.ppo import mathematics
from medicalgpt_cli.engine.training.ppo.roles import Roles, rows_of


@dataclass(frozen=True)
class Asked:
    """A prompt and its token ids."""

    prompt: Prompt
    ids: list[int]


@dataclass
class Rollout:
    """Answers to a batch of prompts. Tensors are (answers, longest answer) unless said; `mask` marks tokens."""

    asked: list[Asked]
    said: list[Message]  # the answers as turns: text, and what was thought and called
    answers: list[list[int]]  # token ids, with the token that ended the answer where there is one
    ended: Tensor  # (answers,) of bool
    mask: Tensor
    logp: Tensor  # of the policy that drew the answers
    ref_logp: Tensor
    values: Tensor | None  # where there is a value function
    entropy: Tensor

    @property
    def texts(self) -> list[str]:
        """All that each answer says, its thoughts and calls as well."""
        return [as_text(one) for one in self.said]

    @property
    def lengths(self) -> list[int]:
        return [len(answer) for answer in self.answers]

    def rows(self, chosen: Sequence[int]) -> list[list[int]]:
        return rows_of([self.asked[i].ids for i in chosen], [self.answers[i] for i in chosen])

    def kl(self) -> Tensor:
        """KL to the reference of each answer, (answers,), in nats: the sum of k1 over its tokens."""
        return mathematics.kl_k1(self.logp, self.ref_logp, self.mask).sum(1)

    def kl_per_token(self) -> float:
        """The same as a mean over all tokens of all answers."""
        return float(mathematics.masked_mean(self.logp - self.ref_logp, self.mask))


def draw(
    backend: LocalBackend, asked: Sequence[Asked], rollout_size: int, numbers: Sequence[int]
) -> list[Answer]:
    """An answer to each prompt. `numbers` make each draw its own, whatever else is drawn."""
    found: dict[int, Answer] = {}
    for piece in batches_by_length([len(one.ids) for one in asked], rollout_size):

        def keep(place: int, answer: Answer, piece: list[int] = piece) -> None:
            found[piece[place]] = answer

        backend.answer_batch(
            [_encoded(asked[index], backend) for index in piece],
            keep,
            numbers=[numbers[index] for index in piece],
        )
    return [found[index] for index in range(len(asked))]


def _encoded(asked: Asked, backend: LocalBackend) -> EncodedPrompt:
    return EncodedPrompt(asked.ids, asked.prompt.tools, backend.sampling.thinking)


def token_ids(answer: Answer) -> list[int]:
    """What the policy said, the token that ended it included; an answer that ends at once has that alone."""
    return [*answer.token_ids, answer.end] if answer.end is not None else list(answer.token_ids)


def targets(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], width: int) -> list[int]:
    """The positions that predict each answer token, counted through rows that are `width` apart (0: end to end)."""
    found, begin = [], 0
    for prompt, answer in zip(prompts, answers, strict=True):
        found += range(begin + len(prompt) - 1, begin + len(prompt) + len(answer) - 1)
        begin += width or len(prompt) + len(answer)
    return found


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """(tokens,) in order to (answers, longest), 0 at padding; the gradient passes through."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def mask_of(answers: Sequence[Sequence[int]], device: Any) -> Tensor:
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    return torch.arange(max(int(lengths.max()), 1), device=device)[None, :] < lengths[:, None]


@torch.no_grad()
def look_back(
    roles: Roles,
    asked: Sequence[Asked],
    answers: Sequence[Answer],
    lay: Callable[[Sequence[Sequence[int]]], dict[str, Tensor]],
    *,
    temperature: float,
    batch_size: int,
) -> Rollout:
    """Log-probabilities under policy and reference, and the values if any, of answers that were drawn.

    Args:
        asked: the prompts of all answers, the same in every process.
        answers: those to this process' share of the prompts (`together.share`): it looks back over them alone.

    Returns:
        The rollout of all answers, the same in every process.
    """
    mine, said = together.share(list(asked)), [token_ids(answer) for answer in answers]
    device = roles.device
    names = ("logp", "ref_logp", "entropy", *(("values",) if roles.value_head is not None else ()))
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(mine), batch_size):
        prompts = [one.ids for one in mine[start : start + batch_size]]
        piece = said[start : start + batch_size]
        batch, positions, tokens = prepared(prompts, piece, lay, device)
        where = positions, tokens, temperature
        logp, entropy = roles.log_probabilities("policy", batch, *where, entropy=True)
        parts["logp"].append(logp)
        parts["entropy"].append(entropy)
        parts["ref_logp"].append(roles.log_probabilities("reference", batch, *where)[0])
        if roles.value_head is not None:
            parts["values"].append(roles.values(batch, positions))
    drawn = together.in_turn(
        [(answer.message, ids, answer.end is not None) for answer, ids in zip(answers, said, strict=True)]
    )
    everything = [ids for _, ids, _ in drawn]
    mask = mask_of(everything, device)
    tensors = {name: spread(_of_all(found, said, device), mask) for name, found in parts.items()}
    return Rollout(
        list(asked),
        [message for message, _, _ in drawn],
        everything,
        torch.tensor([ended for _, _, ended in drawn], device=device),
        mask,
        **{"values": None, **tensors},
    )


@torch.no_grad()
def values_of(
    roles: Roles,
    asked: Sequence[Asked],
    answers: Sequence[Sequence[int]],
    lay: Callable[[Sequence[Sequence[int]]], dict[str, Tensor]],
    *,
    batch_size: int,
) -> Tensor:
    """The value function at each token of answers that were drawn: (answers, longest), 0 at padding.

    Every process has all the answers, and computes those of its share.
    """
    mine, said = together.share(list(asked)), together.share(list(answers))
    found = []
    for start in range(0, len(mine), batch_size):
        prompts = [one.ids for one in mine[start : start + batch_size]]
        batch, positions, _ = prepared(prompts, said[start : start + batch_size], lay, roles.device)
        found.append(roles.values(batch, positions))
    return spread(_of_all(found, said, roles.device), mask_of(answers, roles.device))


def _of_all(found: list[Tensor], said: Sequence[Sequence[int]], device: Any) -> Tensor:
    """Numbers of all answers' tokens, flat and in their order, of those that each process found for its share."""
    if processes.size() == 1:
        return torch.cat(found)
    rows = torch.cat(found).cpu().split([len(one) for one in said]) if found else ()
    return torch.cat(together.in_turn(list(rows))).to(device)


def prepared(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    lay: Callable[[Sequence[Sequence[int]]], dict[str, Tensor]],
    device: Any,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch for a forward pass, the positions that predict answer tokens, and these tokens (flat)."""
    batch = {name: value.to(device) for name, value in lay(rows_of(prompts, answers)).items()}
    width = 0 if batch["input_ids"].shape[0] == 1 else batch["input_ids"].shape[1]
    positions = torch.tensor(targets(prompts, answers, width), device=device)
    tokens = torch.tensor([token for answer in answers for token in answer], device=device)
    return batch, positions, tokens
