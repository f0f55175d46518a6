"""How a command reads its files: its options, checked against them before anything is read for use."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Protocol

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.encodings import check_encoding
from medicalgpt_cli.engine.data.known_keys import SPELLINGS, meaning_of
from medicalgpt_cli.engine.data.naming import key_name
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.engine.data.readers import (
    expand_sources,
    has_encoding,
    is_document,
    is_text,
    is_workbook,
    read_rows,
)
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.fields import did_you_mean


class _Asked(Protocol):
    @property
    def encoding(self) -> str | None: ...

    @property
    def sheet(self) -> str | None: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def strict(self) -> bool: ...

    @property
    def ignore(self) -> tuple[str, ...]: ...


def counts_for(asked: _Asked, sources: Sequence[str]) -> Counts:
    """Empty counts with the rules of a command: how its files are read, and what may stay unused.

    Raises:
        UsageError, DataError: as `reading_options` does.
    """
    return Counts(
        strict=asked.strict,
        ignore=frozenset(asked.ignore),
        group=getattr(asked, "group", None),
        reading=reading_options(asked, sources),
    )


def reading_options(asked: _Asked, sources: Sequence[str]) -> ReadOptions:
    """What `--encoding`, `--sheet` and `--columns` ask for.

    Args:
        sources: all files of the command that are read so; none where they come as a stream.

    Raises:
        UsageError: an unknown encoding or key, or an option that is about none of the sources.
        DataError: a column of `--columns` stands in no record of any source, or a source cannot be read.
    """
    reading = ReadOptions(
        check_encoding(asked.encoding) if asked.encoding is not None else None,
        asked.sheet,
        parse_columns(asked.columns),
    )
    if reading.sheet is not None and not sources:
        raise UsageError(f"--sheet {reading.sheet}: a stream is no workbook", "leave it out")
    if reading == AS_FOUND or not sources:
        return reading
    files, _ = expand_sources(sources, with_documents=True)
    if reading.encoding and not any(has_encoding(file) for file in files):
        raise UsageError(
            f"--encoding {asked.encoding}: {sources[0]} says itself how its text is encoded",
            "leave it out: it is about text, JSON, .csv and .html files",
        )
    if reading.sheet is not None and not any(is_workbook(file) for file in files):
        raise UsageError(f"--sheet {reading.sheet}: {sources[0]} is no workbook", "leave it out")
    if reading.columns:
        _check_columns(sources, reading)
    return reading


def parse_columns(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`question=患者问题,answer=医生回答` as (key, column) pairs. Full-width signs do, too.

    A column's name may have commas.

    Raises:
        UsageError: no such pair, an unknown key, or a key or column that is named twice.
    """
    found: list[tuple[str, str]] = []
    for text in texts:
        for part in re.split(r"[,，](?=\s*\w+\s*[=＝])", text):
            key, equals, column = (one.strip() for one in part.replace("＝", "=", 1).partition("="))
            if not (key and equals and column):
                raise UsageError(
                    f"--columns {part}: no key=column", "for example question=患者问题,answer=医生回答"
                )
            if meaning_of(key) is None:
                near = did_you_mean(key, (one for some in SPELLINGS.values() for one in some))
                swapped = meaning_of(column) is not None
                raise UsageError(
                    f"--columns {part}: {key} is no key that records are read by",
                    f"did you mean {near}?" if near
                    else f"the key stands in front: {column}={key}" if swapped
                    else "for example question, answer, input, system, text",
                )  # fmt: skip
            if key == column:
                raise UsageError(f"--columns {part}: it changes nothing", "leave it out")
            found.append((key, column))
    for place in (0, 1):
        names = [pair[place] for pair in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UsageError(f"--columns: {twice} is named twice", "name each key and each column once")
    return tuple(found)


def _check_columns(sources: Sequence[str], reading: ReadOptions) -> None:
    """Each column stands in some record: files are read until all have been seen."""
    as_it_is = ReadOptions(reading.encoding, reading.sheet)
    missing = {column for _, column in reading.columns}
    seen: dict[str, tuple[int, str]] = {}  # of the first records: a key, its place and where
    files, _ = expand_sources(sources)
    for file in files:
        if is_text(file) or is_document(file):
            continue
        for number, row in enumerate(read_rows(file, reading=as_it_is)):
            if isinstance(row.value, dict):
                missing -= row.value.keys()
                if number < 100:
                    for place, key in enumerate(itertools.islice(row.value, 100), 1):
                        seen.setdefault(key, (place, row.at))
            if not missing:
                return
    column = min(missing)
    near = did_you_mean(column, seen)
    named = key_name(near, *seen[near]) if near else None
    hint = f"did you mean {named}?" if named else "`medgpt data FILE` shows what a file holds"
    raise DataError(f"--columns: no record of {', '.join(sources)} has a {column}", hint)
