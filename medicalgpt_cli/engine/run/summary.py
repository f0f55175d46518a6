"""What the data layer counted, in the order in which the terminal and the report show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Names of the parts of a run's data, as people read them.
_PARTS = {"training": "training data", "held_out": "held-out data"}
# Single numbers worth showing, if they are there.
_FACTS = (
    ("read", "records read"),
    ("used", "used"),
    ("examples", "examples"),
    ("tokens", "tokens"),
    ("target_tokens", "target tokens"),
    ("tokens_cut", "tokens cut"),
)


@dataclass(frozen=True)
class DataPart:
    name: str
    facts: list[tuple[str, str]]  # (label, number)
    formats: list[str]
    reasons: list[tuple[str, str, int, list[str]]]  # (skipped|merged|truncated, reason, rows, example positions)
    notices: list[str]


def data_parts(report: Mapping[str, Any]) -> list[DataPart]:
    """One entry a part of the data (training, held out), or one in all where the report is of a single part."""
    named = {name: part for name, part in report.items() if name in _PARTS and isinstance(part, Mapping)}
    return [_part(_PARTS[name], part) for name, part in named.items()] or [_part("data", report)]


def _part(name: str, report: Mapping[str, Any]) -> DataPart:
    counts = report.get("counts", report)
    facts = []
    for key, label in _FACTS:
        value = report.get(key, counts.get(key))
        if isinstance(value, int) and (value or key in ("read", "used")):
            facts.append((label, f"{value:,}"))
    reasons = []
    for kind in ("skipped", "merged", "truncated"):
        for reason, rows in (counts.get(kind) or {}).items():
            positions = (counts.get("positions") or counts.get("at") or {}).get(reason, [])
            if isinstance(rows, Mapping):
                positions = rows.get("positions") or rows.get("at") or rows.get("examples") or positions
                rows = rows.get("count", 0)
            reasons.append((kind, reason, int(rows), [str(position) for position in positions]))
    formats = counts.get("formats") or {}
    known = sorted(set(formats.values() if isinstance(formats, Mapping) else formats))
    return DataPart(name, facts, known, reasons, list(counts.get("notices") or []))
