"""What a set of examples is like, in numbers: for the screen, for run.json and for the report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import IGNORED, Example


def describe(
    examples: Sequence[Example], counts: Counts, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """Counts by reason, formats, and lengths in tokens with their percentiles and a histogram."""
    lengths = sorted(len(example.input_ids) for example in examples)
    targets = sum(label != IGNORED for example in examples for label in example.labels[1:])
    return {
        **counts.as_dict(),
        "examples": len(examples),
        "tokens": sum(lengths),
        "target_tokens": targets,
        "max_length": max_length,
        "lengths": percentiles(lengths),
        "histogram": histogram(lengths),
    }


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


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over token ids and labels in order: the same data, rendered the same way."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.labels)).encode())
    return digest.hexdigest()
