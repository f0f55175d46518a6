"""`metrics.jsonl`: one JSON line a log step or measurement, readable while the run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.run.files import atomic_write, open_private


def append(path: Path | str, record: Mapping[str, Any]) -> None:
    """Add one line. JSON has no NaN or infinity: such a value is written as null."""
    line = json.dumps({name: _finite(value) for name, value in record.items()}, ensure_ascii=False)
    with open_private(path, "ab") as file:
        file.write(line.encode("utf-8") + b"\n")


def read(path: Path | str) -> list[dict[str, Any]]:
    """All lines in order. A last line that a kill has torn is left out; a missing file is an empty list."""
    path = Path(path)
    if not path.exists():
        return []
    records = [_record(line) for line in path.read_bytes().splitlines()]
    return [record for record in records if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record; None where it is none."""
    try:
        record = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) else None


def drop_after(path: Path | str, step: int) -> int:
    """Forget what came after `step`, and a torn last line: a resumed run writes those steps again.

    Returns:
        How many lines in front of the last one could not be read; they are lost, too.
    """
    path, kept = Path(path), [record for record in read(path) if record.get("step", 0) <= step]
    lines = path.read_bytes().splitlines() if path.exists() else []
    unreadable = sum(_record(line) is None for line in lines[:-1])
    atomic_write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    return unreadable


def series(records: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of every record that has a number under `name`."""
    return [
        (record["step"], record[name])
        for record in records
        if isinstance(record.get(name), (int, float)) and isinstance(record.get("step"), (int, float))
    ]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
