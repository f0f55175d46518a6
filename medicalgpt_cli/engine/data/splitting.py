"""Which conversations are held out, so that quality is measured on what was not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.duplicates import find_duplicates, sections_of
from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.observer import Observer


class _HasMessages(Protocol):
    """A conversation, a prompt or a pair of answers."""

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def at(self) -> str: ...

    @property
    def group(self) -> str | None: ...


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


class Together:
    """What belongs on one side of a split, directly or over others: a disjoint-set forest."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def join(self, one: Hashable, other: Hashable) -> None:
        first, second = self.root(one), self.root(other)
        if first != second:
            self._parent[max(first, second, key=str)] = min(first, second, key=str)

    def root(self, one: Hashable) -> Hashable:
        """The name of the set that `one` is in; the same whatever the order in which things were joined."""
        self._parent.setdefault(one, one)
        while self._parent[one] != one:
            self._parent[one] = self._parent[self._parent[one]]
            one = self._parent[one]
        return one


def split(
    conversations: Sequence[_Asked],
    fraction: float,
    seed: int,
    *,
    alike: Iterable[tuple[int, int]] = (),
) -> tuple[list[_Asked], list[_Asked]]:
    """Hold out a share of the distinct questions: (training, held out).

    Conversations with the same question, of the same group, or alike stay on one side. The choice depends on the
    questions and the seed only, not on the order of the file. A fraction above 0 holds out at least one question of
    two or more.

    Args:
        alike: pairs of positions in `conversations` that belong together, such as near duplicates.
    """
    together = Together()
    keys = [("question", prompt_key(one)) for one in conversations]
    for key, one in zip(keys, conversations, strict=True):
        together.root(key)
        if one.group is not None:
            together.join(key, ("group", one.group))
    for first, second in alike:
        together.join(keys[first], keys[second])
    roots = [together.root(key) for key in keys]
    distinct = set(roots)
    count = min(max(round(len(distinct) * fraction), 1), len(distinct) - 1) if fraction > 0 else 0

    def rank(root: Hashable) -> str:
        kind, key = root
        name = key if kind == "question" else f"\x1e{key}"
        return hashlib.sha256(f"{seed}\x1f{name}".encode("utf-8", "surrogatepass")).hexdigest()

    chosen = set(sorted(distinct, key=rank)[:count])
    sides: tuple[list[_Asked], list[_Asked]] = ([], [])
    for one, root in zip(conversations, roots, strict=True):
        sides[root in chosen].append(one)
    return sides


def hold_out(
    conversations: Sequence[_Asked], fraction: float, seed: int, counts: Counts, observer: Observer
) -> tuple[list[_Asked], list[_Asked]]:
    """As `split`, near duplicates on one side where they can be looked for; what was done is noted in `counts`."""
    if fraction == 0 or len(conversations) < 2:
        return split(conversations, fraction, seed)
    said = [
        sections_of(one.messages, chosen=getattr(one, "chosen", ""), rejected=getattr(one, "rejected", ""))
        for one in conversations
    ]
    found = find_duplicates(said, said, observer)  # equal records have equal questions
    training, held = split(conversations, fraction, seed, alike=found.near.items())
    if not held:
        training, held = split(conversations, fraction, seed)
        counts.notices.append(
            "all records are near duplicates of each other: held out by their question alone"
        )
    elif found.note:
        counts.notices.append(f"near duplicates may stand on both sides of the split: {found.note}")
    elif found.near:
        counts.notices.append(f"{len(found.near):,} near duplicates stand on one side of the split")
    return training, held


def without_held_out(
    training: Sequence[_Asked],
    held_out: Sequence[_HasMessages],
    counts: Counts,
    reason: str = "its question stands in the held-out data",
) -> list[_Asked]:
    """Training data whose question or group is not held out; the others are counted as skipped."""
    held = {prompt_key(conversation) for conversation in held_out}
    groups = {one.group for one in held_out} - {None}
    kept = []
    for conversation in training:
        if prompt_key(conversation) in held:
            counts.add_skip(reason, conversation.at)
        elif conversation.group in groups:
            counts.add_skip("its group stands in the held-out data", conversation.at)
        else:
            kept.append(conversation)
    return kept
