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
    ("documents", "documents"),
    ("blocks", "blocks an epoch"),
    ("pairs", "pairs"),
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
    reasons: list[
        tuple[str, str, int, list[str]]
    ]  # (skipped|merged|truncated, reason, rows, example positions)
    notices: list[str]
    histogram: list[Mapping[str, int]]  # {"from", "to", "count"}: examples by length in tokens


def interval_text(low: float | None, high: float | None, digits: int, unit: str = "") -> str:
    """A 95 % interval; where no resample differed from another there is none."""
    if low is None or high is None:
        return "no spread"
    between = " to " if low < 0 else "–"
    return f"{low:.{digits}f}{between}{high:.{digits}f}{unit}".replace("-", "−")


def change_text(change: Mapping[str, Any] | None, digits: int, scale: float = 1.0, unit: str = "") -> str:
    """The 95 % interval of a paired difference (`paired_differences`); empty where it was not taken."""
    if not change:
        return ""
    if change["low"] is None:
        return "no spread"
    return f"{signed(scale * change['low'], digits)} to {signed(scale * change['high'], digits)}{unit}"


def signed(value: float, digits: int) -> str:
    """A difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def change_of_part(
    change: Mapping[str, Any], part: Mapping[str, Any], figure: str
) -> Mapping[str, Any] | None:
    """The paired difference of a figure of one part: of a source, or of a source's language."""
    for one in change.get("parts") or []:
        if all(one[name] == part.get(name) for name in ("source", "language") if name in one):
            return one.get(figure)
    return None


def data_parts(report: Mapping[str, Any]) -> list[DataPart]:
    """One entry a part of the data (training, held out), or a single one where there are no parts."""
    named = {name: part for name, part in report.items() if name in _PARTS and isinstance(part, Mapping)}
    return [_part(_PARTS[name], part) for name, part in named.items()] or [_part("data", report)]


def _part(name: str, report: Mapping[str, Any]) -> DataPart:
    facts = []
    for key, label in _FACTS:
        value = report.get(key)
        if isinstance(value, int) and (value or key in ("read", "used")):
            facts.append((label, f"{value:,}"))
    reasons = []
    for kind in ("skipped", "merged", "truncated"):
        for reason, rows in (report.get(kind) or {}).items():
            reasons.append((kind, reason, rows, list((report.get("places") or {}).get(reason, []))))
    formats = sorted(set((report.get("formats") or {}).values()))
    return DataPart(
        name, facts, formats, reasons, list(report.get("notices") or []), list(report.get("histogram") or [])
    )


_UNITS = ("documents", "examples", "pairs", "prompts")


def source_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The sources of a mix: name, what it has (documents, say), tokens, share of an epoch, passes an epoch."""
    return [
        (
            one["source"] + (" (replay)" if one["replay"] else ""),
            next(f"{one[unit]:,} {unit}" for unit in _UNITS if unit in one),
            f"{one['tokens']:,}",
            f"{100 * one['share']:.1f} %",
            f"{one['passes_an_epoch']:.2f}",
        )
        for one in report.get("sources") or []
    ]


def part_table(
    before: Mapping[str, Any], after: Mapping[str, Any], change: Mapping[str, Any] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Held-out figures by source, before and after: column names and rows; no rows where there are no parts.

    Args:
        change: `paired_differences`, where they were taken.
    """
    change = change or {}
    difference = ["difference, 95 %"] if change.get("parts") else []
    parts = after.get("parts") or []
    if not parts:
        return [], []
    old = {(one["source"], one.get("language")): one for one in before.get("parts") or []}
    rows = []
    if "bits_per_byte" in parts[0]:
        head = ["held-out text", "language", "bytes", "bits per byte before", "after", *difference]
        for one in parts:
            past = old.get((one["source"], one["language"]))
            was = f"{past['bits_per_byte']:.4f}" if past else "–"
            rows.append(
                [one["source"], one["language"], f"{one['bytes']:,}", was, f"{one['bits_per_byte']:.4f}"]
                + [change_text(change_of_part(change, one, "bits_per_byte"), 4) for _ in difference]
            )
        return head, rows
    accuracy = ["accuracy before", "after"] if old else ["accuracy"]  # scores of a file have no before
    head = ["held-out pairs", "pairs", *accuracy, "95 %", *difference]
    head += ["longer wins", "margin", "calibration error"]
    for one in parts:
        past = old.get((one["source"], None))
        was = [f"{100 * past['accuracy']:.1f} %" if past else "–"] if old else []
        now, interval = f"{100 * one['accuracy']:.1f} %", percent_interval(one)
        rest = [
            *(change_text(change_of_part(change, one, "accuracy"), 1, 100) for _ in difference),
            f"{100 * one['longer_wins']:.1f} %",
            f"{one['margin']:.3f}",
            f"{one['calibration_error']:.3f}",
        ]
        rows.append([one["source"], f"{one['pairs']:,}", *was, now, interval, *rest])
    return head, rows


def percent_interval(part: Mapping[str, Any], unit: str = "") -> str:
    """The interval of an accuracy, in percent."""
    low, high = (None if part[end] is None else 100 * part[end] for end in ("low", "high"))
    return interval_text(low, high, 1, unit)


def length_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Accuracy of a reward model by which answer is longer: source, which, pairs, accuracy."""
    return [
        [part["source"], name.removeprefix("chosen "), f"{one['pairs']:,}", f"{100 * one['accuracy']:.1f} %"]
        for part in figures.get("parts") or []
        for name, one in (part.get("by_length") or {}).items()
    ]
