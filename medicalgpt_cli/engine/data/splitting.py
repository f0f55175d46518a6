"""Which conversations are held out, so that quality is measured on what was not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.duplicates import Section, find_duplicates, sections_of, why_not_near
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


def question_hash(conversation: _HasMessages) -> int:
    """64 bits that stand for a question; a table of them does not tell what was asked."""
    return _hash(prompt_key(conversation))


def group_hash(conversation: _HasMessages) -> int:
    """64 bits that stand for what a conversation belongs to (`--group`); 0 where that is not said."""
    return 0 if conversation.group is None else _hash(f"\x1e{conversation.group}") or 1


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def roots_of(
    questions: np.ndarray, groups: np.ndarray | None = None, alike: Iterable[tuple[int, int]] = ()
) -> np.ndarray:
    """One hash for all that belongs together, directly or over others: (conversations,).

    It is the lowest hash of the questions that belong together, whatever the order of the conversations.

    Args:
        questions, groups: hashes, (conversations,); a group of 0 is none.
        alike: pairs of positions that belong together.
    """
    pairs = np.array([*alike], dtype=np.int64).reshape(-1, 2)
    links = [np.unique(questions, return_inverse=True)[1]]
    if groups is not None and groups.any():
        names = np.unique(groups, return_inverse=True)[1]
        alone = groups == 0
        names[alone] = names.max() + 1 + np.arange(int(alone.sum()))
        links.append(names)
    roots, before = questions.copy(), None
    while before is None or not np.array_equal(before, roots):
        before = roots.copy()
        for names in links:
            lowest = np.full(int(names.max(initial=-1)) + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
            np.minimum.at(lowest, names, roots)
            roots = lowest[names]
        for first, second in (pairs.T, pairs.T[::-1]):
            np.minimum.at(roots, first, roots[second])
    return roots


def held_out(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which of some texts or questions are held out: (texts,) of bool.

    Equal ones stay on one side. The choice depends on them and the seed only, not on their order.
    A fraction above 0 holds out at least one of two or more.
    """
    distinct = np.unique(hashes)
    count = min(max(round(len(distinct) * fraction), 1), len(distinct) - 1) if fraction > 0 else 0
    chosen = distinct[np.argsort(mixed(distinct, seed), kind="stable")[: max(count, 0)]]
    return np.isin(hashes, chosen)


def mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Another order of the hashes for each seed (the finaliser of SplitMix64, Steele and others 2014)."""
    with np.errstate(over="ignore"):
        found = hashes + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return found ^ (found >> np.uint64(31))


def split(
    conversations: Sequence[_Asked],
    fraction: float,
    seed: int,
    *,
    alike: Iterable[tuple[int, int]] = (),
) -> tuple[list[_Asked], list[_Asked]]:
    """Hold out a share of the distinct questions (`held_out`): (training, held out).

    Conversations with the same question, of the same group, or alike stay on one side.

    Args:
        alike: pairs of positions in `conversations` that belong together, such as near duplicates.
    """
    questions = np.array([question_hash(one) for one in conversations], dtype=np.uint64)
    groups = np.array([group_hash(one) for one in conversations], dtype=np.uint64)
    out = held_out(roots_of(questions, groups, alike), fraction, seed).tolist()
    training = [one for one, is_out in zip(conversations, out, strict=True) if not is_out]
    return training, [one for one, is_out in zip(conversations, out, strict=True) if is_out]


def hold_out(
    conversations: Sequence[_Asked], fraction: float, seed: int, counts: Counts, observer: Observer
) -> tuple[list[_Asked], list[_Asked]]:
    """As `split`, near duplicates on one side where they can be looked for; what was done is noted in `counts`."""
    near = near_duplicates(
        map(told_by, conversations), len(conversations), fraction, counts.notices, observer
    )
    training, held = split(conversations, fraction, seed, alike=near)
    if near and not held:
        counts.notices[-1] = ALL_ALIKE
        training, held = split(conversations, fraction, seed)
    return training, held


def told_by(one: _HasMessages) -> list[Section]:
    """What a conversation, a prompt or a pair says, by who says it."""
    answers = {name: getattr(one, name) for name in ("chosen", "rejected") if hasattr(one, name)}
    return sections_of(one.messages, **answers)


def near_duplicates(
    told: Iterable[list[Section]], number: int, fraction: float, notices: list[str], observer: Observer
) -> list[tuple[int, int]]:
    """Pairs of positions that are to stand on one side of a split; none where nothing is held out.

    Args:
        told: what each of `number` conversations says; not looked at where they are too many.
        notices: takes a line about what was found, or why nothing was looked for.
    """
    if fraction == 0 or number < 2:
        return []
    if reason := why_not_near(number, _MOST):
        notices.append(f"near duplicates may stand on both sides of the split: {reason}")
        return []
    said = list(told)
    found = [*find_duplicates(said, said, observer).near.items()]  # equal ones have equal questions
    if found:
        notices.append(f"{len(found):,} near duplicates stand on one side of the split")
    return found


_MOST = 20_000  # conversations: looking for near duplicates holds up the start of a run
ALL_ALIKE = "all records are near duplicates of each other: held out by their question alone"


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
