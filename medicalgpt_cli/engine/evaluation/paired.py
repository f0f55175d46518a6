"""Two measurements of the same held-out items, compared in pairs.

The interval of each figure says how far it might lie on other items. How much training has changed it on the same ones
is another question: what makes an item hard makes it hard before and after, and drops out of the difference. Two
intervals may overlap widely where the difference is beyond doubt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from medicalgpt_cli.engine.evaluation.statistics import ratio_interval


@dataclass(frozen=True)
class PerItem:
    """Held-out figures item by item. A figure of all items is sum(tops) / sum(bottoms).

    groups: one name an item; items of one name (answers to one prompt, windows of one document) are no independent
    draws and are resampled together. parts: what an item belongs to, for figures that are told apart. by_part: figures
    that are never taken over all parts together.
    """

    groups: list[Any]
    tops: dict[str, list[float]]
    bottoms: dict[str, list[float]]
    parts: list[dict[str, str]] = field(default_factory=list)
    by_part: list[str] = field(default_factory=list)

    as_dict = asdict


def per_answer(groups: Sequence[Any], figures: Mapping[str, Sequence[float]], **more: Any) -> PerItem:
    """Figures that are plain means over the items."""
    ones = {name: [1.0] * len(groups) for name in figures}
    return PerItem(list(groups), {name: list(values) for name, values in figures.items()}, ones, **more)


def per_text(
    groups: Sequence[Any],
    nats: Sequence[tuple[float, float]],
    tokens: Sequence[int],
    sizes: Sequence[int],
    **more: Any,
) -> PerItem:
    """Loss a target token, and bits per byte.

    Args:
        nats: of all targets of an item, and of those that spell text. sizes: UTF-8 bytes that these spell.
    """
    tops = {"loss": [one for one, _ in nats], "bits_per_byte": [text / math.log(2) for _, text in nats]}
    bottoms = {"loss": [float(one) for one in tokens], "bits_per_byte": [float(one) for one in sizes]}
    return PerItem(list(groups), tops, bottoms, **more)


def paired_differences(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Any]:
    """How each figure has changed on the same items.

    Args:
        before, after: as `PerItem.as_dict` gives them.

    Returns:
        {figure: {"difference": after - before, "low", "high": its 95 % interval, None where every item has changed
        alike (no spread)}}, and under "parts" the same for each part, with what names it. Empty where one of the two
        is not there, or is of other items.
    """
    if not before or not after or any(before[name] != after[name] for name in ("groups", "bottoms", "parts")):
        return {}
    whole = [name for name in after["tops"] if name not in after["by_part"]]
    found: dict[str, Any] = _over(range(len(after["groups"])), whole, before, after)
    parts = []
    for part in _distinct(after["parts"]):
        inside = [index for index, one in enumerate(after["parts"]) if one == part]
        parts.append({**part, **_over(inside, list(after["tops"]), before, after)})
    return {**found, "parts": parts} if parts else found


def _over(
    inside: Sequence[int], names: Sequence[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    groups = [after["groups"][index] for index in inside]
    found = {}
    for name in names:
        change = [after["tops"][name][index] - before["tops"][name][index] for index in inside]
        bottoms = [after["bottoms"][name][index] for index in inside]
        if not sum(bottoms):
            continue
        interval = ratio_interval(change, bottoms, groups)
        low, high = interval or (None, None)
        found[name] = {"difference": math.fsum(change) / math.fsum(bottoms), "low": low, "high": high}
    return found


def _distinct(parts: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [dict(one) for one in dict.fromkeys(tuple(part.items()) for part in parts)]
