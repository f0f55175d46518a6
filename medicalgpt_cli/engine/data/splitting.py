"""Which conversations are held out, so that quality is measured on what was not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.messages import Message


class _HasMessages(Protocol):
    """A conversation or a pair of answers."""

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def at(self) -> str: ...


_Asked = TypeVar("_Asked", bound=_HasMessages)


def prompt_key(conversation: _HasMessages) -> str:
    """What makes two conversations the same question: all that the user says before the first answer to it."""
    opening = []
    for message in conversation.messages:
        if message["role"] == "assistant" and opening:  # not a greeting in front of the first question
            break
        if message["role"] == "user":
            opening.append(" ".join(message["content"].split()))
    return "\x1f".join(opening)


def split(conversations: Sequence[_Asked], fraction: float, seed: int) -> tuple[list[_Asked], list[_Asked]]:
    """Hold out a share of the distinct questions: (training, held out).

    Conversations with the same question stay on one side. The choice depends on the questions and the seed
    only, not on the order of the file. A fraction above 0 holds out at least one question of two or more.
    """
    keys = {prompt_key(conversation) for conversation in conversations}
    count = min(max(round(len(keys) * fraction), 1), len(keys) - 1) if fraction > 0 else 0

    def rank(key: str) -> str:
        return hashlib.sha256(f"{seed}\x1f{key}".encode("utf-8", "surrogatepass")).hexdigest()

    chosen = set(sorted(keys, key=rank)[:count])
    training = [one for one in conversations if prompt_key(one) not in chosen]
    return training, [one for one in conversations if prompt_key(one) in chosen]


def without_held_out(
    training: Sequence[_Asked],
    held_out: Sequence[_HasMessages],
    counts: Counts,
    reason: str = "its question stands in the held-out data",
) -> list[_Asked]:
    """Training data whose question is not held out; the others are counted as skipped."""
    held = {prompt_key(conversation) for conversation in held_out}
    kept = []
    for conversation in training:
        if prompt_key(conversation) in held:
            counts.add_skip(reason, conversation.at)
        else:
            kept.append(conversation)
    return kept
