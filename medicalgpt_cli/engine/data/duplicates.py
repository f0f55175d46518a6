"""Records that say the same, and records that say nearly the same.

Near duplicates are compared as in Lee et al. 2022 ("Deduplicating Training Data Makes Language Models Better"): the
Jaccard similarity of their sets of shingles, runs of three words or Chinese characters, has to be at least 0.8.
Candidates come from MinHash and locality-sensitive hashing (Broder 1997; datasketch), and each is compared exactly, so
that no pair is a mistake; a pair at the threshold is found with a probability of 99 %.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.observer import Observer

NEAR = 0.8  # Jaccard similarity from which two records are near duplicates
MOST = 100_000  # records among which near duplicates are looked for
_LONGEST = 20_000  # characters of a record that are compared
_WORDS = 3  # of a shingle
_BANDS, _ROWS = 12, 5  # of the hash table: 1 - (1 - 0.8^5)^12 = 0.99 of the pairs at 0.8 become candidates
_COMPARED = 16  # candidates of a record that are compared with it
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")


@dataclass(frozen=True)
class Duplicates:
    """For positions of records: the earlier record that each repeats, exactly or nearly."""

    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, int] = field(default_factory=dict)
    note: str | None = None  # why near ones were not looked for

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(later, earlier) of all of them."""
        return sorted([*self.exact.items(), *self.near.items()])


Section = tuple[str, str]  # who says it, what is said


def sections_of(messages: Iterable[Message], **more: str) -> list[Section]:
    """What a record says, by who says it: reasoning and calls, too. A system message is alike in many records.

    Args:
        more: further sections, such as the answers of a pair.
    """
    found: list[Section] = []
    for one in messages:
        if one["role"] != "system":
            calls = [f"{call['name']} {call['arguments']}" for call in one.get("tool_calls", ())]
            found.append((one["role"], "\n".join([one.get("reasoning", ""), one["content"], *calls])))
    return [*found, *more.items()]


def find_duplicates(
    identities: Sequence[Any], said: Sequence[Sequence[Section]], observer: Observer, *, most: int = MOST
) -> Duplicates:
    """What repeats an earlier record. An exact duplicate is not looked at a second time.

    Args:
        identities: what makes records the same; equal `repr` means equal records.
        said: what each record says. Two that say the same in other roles (chosen and rejected) are no duplicates.
        most: no near duplicates are looked for among more records.
    """
    seen: dict[bytes, int] = {}
    exact: dict[int, int] = {}
    for place, identity in enumerate(identities):
        digest = hashlib.blake2b(repr(identity).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = seen.setdefault(digest, place)
        if first != place:
            exact[place] = first
    if note := why_not_near(len(said), most):
        return Duplicates(exact, {}, note)
    return Duplicates(exact, dict(_near(said, exact, observer)))


def why_not_near(number: int, most: int = MOST) -> str | None:
    """Why near duplicates cannot be looked for among so many records; None where they can."""
    if importlib.util.find_spec("datasketch") is None:
        return "near ones need datasketch: pip install medicalgpt-cli[quality]"
    return f"near ones are looked for among up to {most:,} records" if number > most else None


def _near(
    said: Sequence[Sequence[Section]], exact: dict[int, int], observer: Observer
) -> Iterator[tuple[int, int]]:
    """(record, the first record that it is a near duplicate of)."""
    from datasketch import MinHash, MinHashLSH

    empty = MinHash(num_perm=_BANDS * _ROWS, hashfunc=int)
    table = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
    task = "looking for near duplicates"
    observer.on_task_start(task, len(said), "records")
    for place, sections in enumerate(said):
        if place % 500 == 0:
            observer.on_task_advance(task, place)
        shingles = _shingles(sections)
        if place in exact or not len(shingles):
            continue
        sketch = empty.copy()
        sketch.update_batch(shingles.tolist())
        candidates = sorted(table.query(sketch))[:_COMPARED]
        first = next((one for one in candidates if _similar(shingles, _shingles(said[one]))), None)
        if first is None:
            table.insert(place, sketch, check_duplication=False)
        else:
            yield place, first
    observer.on_task_end(task)


def _shingles(sections: Sequence[Section]) -> np.ndarray:
    """Sorted 32-bit hashes of the runs of words in what is said, with who says it."""
    room, found = _LONGEST, []
    for name, text in sections:
        hashes = _runs(text[:room])
        found.append(hashes * np.uint32(2 * zlib.crc32(name.encode()) + 1 & 0xFFFFFFFF))
        room = max(room - len(text), 0)
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.uint32)


def _runs(text: str) -> np.ndarray:
    """32-bit hashes of the runs of words in a text; of the whole where it has fewer words than a run."""
    words = np.array(
        [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text.casefold())],
        dtype=np.uint64,
    )
    if not len(words):
        return words.astype(np.uint32)
    width = min(_WORDS, len(words))
    mixed = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for offset in range(width):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + len(mixed)]
    return (mixed >> np.uint64(32)).astype(np.uint32) ^ mixed.astype(np.uint32)


def _similar(one: np.ndarray, other: np.ndarray) -> bool:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common >= NEAR * (len(one) + len(other) - common)
