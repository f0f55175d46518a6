"""What a set of examples is like, in numbers: for the screen, for run.json and for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import IGNORED, Example


def describe(
    examples: Sequence[Example], counts: Counts, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """Counts by reason, formats, and lengths in tokens with their percentiles and a histogram."""
    lengths = [len(example.input_ids) for example in examples]
    targets = sum(label != IGNORED for example in examples for label in example.labels[1:])
    return {**counts.as_dict(), **figures(lengths, targets, max_length)}


def figures(lengths: Iterable[int], targets: int, max_length: int) -> dict[str, Any]:
    """What the lengths of examples say."""
    ordered = sorted(lengths)
    return {
        "examples": len(ordered),
        "tokens": sum(ordered),
        "target_tokens": targets,
        "max_length": max_length,
        "lengths": percentiles(ordered),
        "histogram": histogram(ordered),
    }


_ADDED = ("skipped", "merged", "truncated")  # counts by reason
_PLACES = 5  # that are kept of each reason


def merged_counts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of several sources (`Counts.as_dict`) as one."""
    found: dict[str, Any] = {
        "read": 0,
        "used": 0,
        "tokens_cut": 0,
        "formats": {},
        "notices": [],
        "places": {},
    }
    found |= {name: {} for name in _ADDED}
    unused: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        for name in ("read", "used", "tokens_cut"):
            found[name] += part.get(name, 0)
        for name in _ADDED:
            for reason, number in part.get(name, {}).items():
                found[name][reason] = found[name].get(reason, 0) + number
        found["formats"] |= part["formats"]
        found["notices"] += part["notices"]
        for reason, places in part["places"].items():
            found["places"][reason] = [*found["places"].get(reason, []), *places][:_PLACES]
        for one in part.get("unused", []):
            key = (one["key"], one["where"], one["meaning"], one["accepted"])
            before = unused.get(key, {"records": 0})["records"]
            unused[key] = {**one, "records": before + one["records"]}
    found["unused"] = sorted(unused.values(), key=lambda one: (-one["records"], one["where"], one["key"]))
    return found


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Smallest, median, 90th and 99th percentile and largest of sorted lengths; empty without any."""
    if not lengths:
        return {}

    def at(share: float) -> int:
        return lengths[min(int(share * len(lengths)), len(lengths) - 1)]

    return {"min": lengths[0], "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": lengths[-1]}


def histogram(lengths: Sequence[int], bins: int = 12) -> list[dict[str, int]]:
    """Bars of equal width: {"from", "to", "count"}, `to` included."""
    if not lengths:
        return []
    width = max(-(-(max(lengths) + 1) // bins), 1)
    counts = [0] * bins
    for length in lengths:
        counts[length // width] += 1
    bars = [{"from": i * width, "to": (i + 1) * width - 1, "count": count} for i, count in enumerate(counts)]
    while bars and bars[-1]["count"] == 0:
        bars.pop()
    return bars
