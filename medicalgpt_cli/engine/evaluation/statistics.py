"""Small statistics of evaluations: intervals, calibration, correlation, variety."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); without any trial all of 0 to 1."""
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # The ends are exact where rounding would put them a hair beside 0 or 1.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == total else (centre + half) / scale
    return low, high


def mean_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float] | None:
    """`ratio_interval` of a mean."""
    return ratio_interval(values, [1.0] * len(values), groups, confidence, seed, resamples)


def ratio_interval(
    tops: Sequence[float],
    bottoms: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of sum(tops) / sum(bottoms) (Efron & Tibshirani 1993).

    The same seed gives the same interval. Whole groups are drawn, where there are any: items of one group are alike,
    and drawing them apart would make the interval too narrow (Field & Welsh 2007, the cluster bootstrap).

    Args:
        tops, bottoms: (items,). groups: what each item belongs to; None where each stands for itself.

    Returns:
        None where there is no spread: one group, or all groups alike. No resample differs from another then, and an
        interval of width 0 would claim a certainty that nobody has.
    """
    if not len(tops):
        raise ValueError("no values to average")
    numbers = range(len(tops)) if groups is None else groups
    places = {name: place for place, name in enumerate(dict.fromkeys(numbers))}
    inside = np.asarray([places[name] for name in numbers])
    above, below = (
        np.bincount(inside, weights=np.asarray(side, dtype=np.float64)) for side in (tops, bottoms)
    )
    shares = above[below > 0] / below[below > 0]
    if not shares.size or np.ptp(shares) <= 1e-12 * np.abs(shares).max():
        return None
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(len(places), size=len(places))
        found.append(above[drawn].sum() / max(below[drawn].sum(), np.finfo(np.float64).tiny))
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def share_interval(
    values: Sequence[float], groups: Sequence[Hashable] | None = None
) -> tuple[float, float] | None:
    """95 % interval of a mean of values in 0 to 1 of which each is right or wrong (a tie may count half).

    Wilson's, where each value stands for itself; by groups the bootstrap of whole groups, None without spread.
    """
    if groups is None or len(set(groups)) == len(values):
        return wilson_interval(sum(values), len(values))
    return mean_interval(values, groups=groups)


def reliability_bins(
    probabilities: Sequence[float], outcomes: Sequence[bool | int], bins: int = 10
) -> list[dict[str, Any]]:
    """A reliability diagram's bins, of equal width; a bin has its lower edge, the last one also 1.

    Returns:
        For each bin from, to, count, mean_probability and share_right; the last two None where it is empty.
    """
    p, right = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if p.shape != right.shape:
        raise ValueError(f"{p.size} probabilities and {right.size} outcomes")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a probability lies outside 0 to 1")
    edges = [index / bins for index in range(bins + 1)]
    # Compared with the edges that are reported: int(0.29 * 100) is 28.
    place = np.minimum(np.searchsorted(edges, p, side="right") - 1, bins - 1)
    result = []
    for index in range(bins):
        inside = place == index
        count = int(inside.sum())
        result.append(
            {
                "from": edges[index],
                "to": edges[index + 1],
                "count": count,
                "mean_probability": float(p[inside].mean()) if count else None,
                "share_right": float(right[inside].mean()) if count else None,
            }
        )
    return result


def expected_calibration_error(
    probabilities: Sequence[float], outcomes: Sequence[bool | int], bins: int = 10
) -> float:
    """Mean over all answers of |share right - mean probability| of their bin (Naeini et al. 2015)."""
    if not len(probabilities):
        raise ValueError("no probabilities to compare")
    gaps = [
        part["count"] * abs(part["share_right"] - part["mean_probability"])
        for part in reliability_bins(probabilities, outcomes, bins)
        if part["count"]
    ]
    return math.fsum(gaps) / len(probabilities)


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation in -1 to 1; None where it is undefined: under two pairs, a constant side, a value not finite."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values beside {len(y)}")
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    sides = []
    for side in (np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)):
        if side.min() == side.max():
            return None
        # From the first value and to a span of 1: neither a large level nor a large scale costs digits.
        side = (side - side[0]) / (side.max() - side.min())
        centred = side - side.mean()
        sides.append(centred / np.sqrt((centred**2).sum()))
    return float(np.clip((sides[0] * sides[1]).sum(), -1.0, 1.0))


def distinct_n(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of all texts (Li et al. 2016); None where no text has n tokens.

    Args:
        texts: token ids. An n-gram does not reach from one text into the next.
    """
    grams = [tuple(text[start : start + n]) for text in texts for start in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
