"""Which keys and roles of a record a message may name: a file can have a patient's words where a name belongs.

Named is what medgpt reads records by, and what looks like a name and stands in many records of its file. Anything
else is called by its place: "key 4".
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data.known_keys import is_known
from medicalgpt_cli.engine.data.readers import ReadOptions, read_again, read_as
from medicalgpt_cli.errors import MedgptError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}|[\u4e00-\u9fff]{1,12}")
SHARE = 0.05  # of a file's records that have to hold a name
_COUNTED = 20_000  # records from the front of a file that are looked through
_SHOWN = 8


def looks_like_a_name(word: str) -> bool:
    return _NAME.fullmatch(word) is not None


def key_name(key: Any, place: int, at: str) -> str:
    """The key itself where it may be named, else "key 4".

    Args:
        place: which key of its object it is, from 1. at: the record's file:line.
    """
    return str(key) if (isinstance(key, str) and is_known(key)) or _may_be_named(key, at) else f"key {place}"


def keys_found(value: Mapping[str, Any], at: str) -> str:
    """The keys of an object in their order, for a message; "none" where it is empty."""
    shown = [key_name(key, place, at) for place, key in enumerate(itertools.islice(value, _SHOWN), 1)]
    more = ["…"] if len(value) > _SHOWN else []
    return ", ".join([*shown, *more]) or "none"


def role_name(role: str, at: str) -> str | None:
    """A role that is not known to medgpt, in quotes; None where a message may not name it."""
    return repr(role) if _may_be_named(role, at) else None


def _may_be_named(word: Any, at: str) -> bool:
    if not isinstance(word, str) or not looks_like_a_name(word):
        return False
    path = Path(at.rpartition(":")[0])
    if not path.is_file():  # a stream or a data set of the hub: nothing to count in
        return False
    status = path.stat()
    counts, records = _names_in(path, read_as(path), status.st_size, status.st_mtime_ns)
    return records > 0 and counts[word] >= SHARE * records


@functools.lru_cache(maxsize=8)
def _names_in(path: Path, _reading: ReadOptions, _size: int, _changed: int) -> tuple[Counter[str], int]:
    """In how many records each key and role stands, and of how many: of those in front of what cannot be read."""
    counts: Counter[str] = Counter()
    records = 0
    try:
        for row in itertools.islice(read_again(path), _COUNTED):
            counts.update(set(_names_of(row.value)))
            records += 1
    except MedgptError:
        pass
    return counts, records


def _names_of(value: Any) -> Iterator[str]:
    """The keys and roles of a record and of the objects in its lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            if key in ("role", "from") and isinstance(inner, str):
                yield inner
            yield from _names_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names_of(inner)
