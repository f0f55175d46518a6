"""Which conversations are held out, so that quality is measured on what was not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from medicalgpt_cli.engine.data.formats import Counts, Message


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


def question_hash(conversation: _HasMessages) -> int:
    """64 bits that stand for a question; a table of them does not tell what was asked."""
    key = prompt_key(conversation).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def held_out(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which of some texts or questions are held out: (texts,) of bool.

    Equal ones stay on one side. The choice depends on them and the seed only, not on their order.
    A fraction above 0 holds out at least one of two or more.
    """
    distinct = np.unique(hashes)
    count = min(max(round(len(distinct) * fraction), 1), len(distinct) - 1) if fraction > 0 else 0
    chosen = distinct[np.argsort(mixed(distinct, seed), kind="stable")[:count]]
    return np.isin(hashes, chosen)


def mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Another order of the hashes for each seed (the finaliser of SplitMix64, Steele and others 2014)."""
    with np.errstate(over="ignore"):
        found = hashes + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return found ^ (found >> np.uint64(31))


def split(conversations: Sequence[_Asked], fraction: float, seed: int) -> tuple[list[_Asked], list[_Asked]]:
    """Hold out a share of the distinct questions (`held_out`): (training, held out)."""
    hashes = np.array([question_hash(one) for one in conversations], dtype=np.uint64)
    chosen = held_out(hashes, fraction, seed)
    training = [one for one, out in zip(conversations, chosen, strict=True) if not out]
    return training, [one for one, out in zip(conversations, chosen, strict=True) if out]


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
