"""The normalised records of an inspection as new files, without duplicates and split where that is asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data.inspection import Inspection, Item
from medicalgpt_cli.engine.data.messages import Conversation, Message
from medicalgpt_cli.engine.data.normalised import line_of
from medicalgpt_cli.engine.data.preferences import Pair
from medicalgpt_cli.engine.data.splitting import split
from medicalgpt_cli.engine.run.files import TEMPORARY, fsync_path, open_private
from medicalgpt_cli.errors import UsageError


@dataclass(frozen=True)
class _Unit:
    """What `split` asks of a record, and its line."""

    messages: tuple[Message, ...]
    at: str
    group: str | None
    line: str


def output_files(output: Path, share: float | None) -> list[Path]:
    """The files that are written: one, or one for training and one held out.

    Raises:
        UsageError: one exists already, or its folder does not, or it is no .jsonl file.
    """
    if output.suffix != ".jsonl":
        raise UsageError(f"--output {output}: records are written as JSON lines", "name a .jsonl file")
    files = [output]
    if share is not None:
        files = [output.with_name(f"{output.stem}.{part}.jsonl") for part in ("train", "eval")]
    for file in files:
        if os.path.lexists(file):
            raise UsageError(f"{file} exists already", "name a new file; nothing is overwritten")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such folder", "make it first, or name another")
    return files


def parse_split(text: str) -> float:
    """The held-out share of `0.9/0.1`.

    Raises:
        UsageError: these are no two shares that make up the whole.
    """
    shares = re.fullmatch(r"\s*([0-9.]+)\s*/\s*([0-9.]+)\s*", text)
    try:
        training, held = (float(one) for one in shares.groups()) if shares else (0.0, 0.0)
    except ValueError:
        training = held = 0.0
    if not (training > 0 and held > 0 and abs(training + held - 1) < 1e-6):
        raise UsageError(f"--split {text}: no two shares that make up 1", "for example 0.9/0.1")
    return held


def write_clean(
    found: Inspection, output: Path, *, share: float | None, seed: int, deduplicate: bool
) -> dict[str, Any]:
    """Write the records; of duplicates the first where `deduplicate` says so.

    Records with one question, of one group, and near duplicates stand on one side of the split.

    Returns:
        How many records each file has, and how many duplicates were left out.

    Raises:
        UsageError: as `output_files`, or there is nothing to hold out.
    """
    files = output_files(output, share)
    repeated = dict(found.duplicates.pairs)
    kept = [place for place in range(len(found.items)) if not deduplicate or place not in repeated]
    units = [_unit(found.items[place]) for place in kept]
    parts: Sequence[Sequence[_Unit]] = [units]
    if share is not None:
        numbers = {place: number for number, place in enumerate(kept)}
        alike = [(numbers[one], numbers[first]) for one, first in found.duplicates.pairs if one in numbers]
        parts = split(units, share, seed, alike=alike)
        if not all(parts):
            raise UsageError(
                "--split: all records belong together (one question, one group, or near duplicates)",
                "leave out --split, or --group",
            )
    _write({file: [unit.line for unit in part] for file, part in zip(files, parts, strict=True)})
    left_out = {"exact": len(found.duplicates.exact), "near": len(found.duplicates.near)}
    return {
        "files": {str(file): len(part) for file, part in zip(files, parts, strict=True)},
        "left_out": left_out if deduplicate else {"exact": 0, "near": 0},
    }


def _unit(item: Item) -> _Unit:
    """What is made of a record has its question as training knows it."""
    made: list[Conversation | Pair] = [*item.conversations, *item.pairs]
    messages = made[0].messages if made else item.record.messages
    if item.record.text is not None:
        messages = ({"role": "user", "content": item.record.text},)
    return _Unit(messages, item.record.at, item.record.group, line_of(item.value))


def _write(files: Mapping[Path, Sequence[str]]) -> None:
    """All files whole or none; the user alone may read them."""
    temporary = {file: file.with_name(f".{file.name}.{os.getpid()}{TEMPORARY}") for file in files}
    try:
        for file, lines in files.items():
            with open_private(temporary[file], "wb") as into:
                for line in lines:
                    into.write(line.encode("utf-8") + b"\n")
                into.flush()
                os.fsync(into.fileno())
        for file in files:
            if os.path.lexists(file):
                raise UsageError(f"{file} exists already", "name a new file; nothing is overwritten")
        for file in files:
            temporary[file].rename(file)
            fsync_path(file.parent)
    finally:
        for one in temporary.values():
            one.unlink(missing_ok=True)
