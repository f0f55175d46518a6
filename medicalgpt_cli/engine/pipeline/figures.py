"""What a pipeline's steps came to: their held-out figures before and after, from the run folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.run.summary import change_of_part, change_text, interval_text, percent_interval

# (key, what it is called, digits, whether less is better; None where neither is)
_OF_A_RUN: tuple[tuple[str, str, int, bool | None], ...] = (
    ("bits_per_byte", "bits per byte", 4, True),
    ("loss", "held-out loss", 4, True),
    ("reward", "held-out reward", 3, False),
    ("kl", "KL to the start, nats", 2, None),
    ("answer_tokens", "tokens an answer", 1, None),
    ("ended", "answers that end by themselves", 2, False),
)


@dataclass(frozen=True)
class Figure:
    """One held-out figure of a step. Texts are as they are shown; the interval is at 95 %."""

    step: str
    name: str
    before: str
    after: str
    interval: str = ""
    better: bool | None = None  # None: neither is better
    difference: str = ""  # the interval at 95 % of after − before on the same items


def figures(name: str, manifest: Mapping[str, Any]) -> list[Figure]:
    """The figures of one training run; none while it is not done."""
    result = manifest.get("result") or {}
    before, after, change = (result.get(name) or {} for name in ("before", "after", "change"))
    found = []
    for key, label, digits, less in _OF_A_RUN:
        if not isinstance(before.get(key), (int, float)) or not isinstance(after.get(key), (int, float)):
            continue
        old, new = before[key], after[key]
        interval = ""
        if f"{key}_low" in after:
            interval = interval_text(after[f"{key}_low"], after[f"{key}_high"], digits)
        better = None if less is None or old == new else (new < old) == less
        difference = change_text(change.get(key), digits)
        found.append(
            Figure(name, label, f"{old:.{digits}f}", f"{new:.{digits}f}", interval, better, difference)
        )
    return found + _by_source(name, before, after, change)


def _by_source(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], change: Mapping[str, Any]
) -> list[Figure]:
    """A line for each held-out file: pair accuracy is never pooled, bits per byte stand by language."""
    old = {(one["source"], one.get("language")): one for one in before.get("parts") or []}
    parts = after.get("parts") or []
    found = []
    for one in parts:
        past = old.get((one["source"], one.get("language")))
        source = Path(one["source"]).name
        if "accuracy" in one:
            interval = percent_interval(one, " %")
            difference = change_text(change_of_part(change, one, "accuracy"), 1, 100, " pp")
            was = f"{100 * past['accuracy']:.1f} %" if past else "–"
            better = past and one["accuracy"] > past["accuracy"]
            label = (
                f"pairs told apart, {source} ({one['pairs']}; longer wins {100 * one['longer_wins']:.1f} %)"
            )
            found.append(
                Figure(name, label, was, f"{100 * one['accuracy']:.1f} %", interval, better, difference)
            )
        elif past and len(parts) > 1:
            label = f"bits per byte, {source}, {one['language']}"
            values = past["bits_per_byte"], one["bits_per_byte"]
            difference = change_text(change_of_part(change, one, "bits_per_byte"), 4)
            better = values[1] < values[0]
            found.append(Figure(name, label, f"{values[0]:.4f}", f"{values[1]:.4f}", "", better, difference))
    return found
