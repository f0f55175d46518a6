"""How much is taken of each source: weights of `FILE:0.7`, and shares of `--max-samples`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data.readers import HubDataset, expand_sources
from medicalgpt_cli.errors import DataError, UsageError


@dataclass(frozen=True)
class Source:
    """One `--train-data`: a file, folder or hub name, and its share where `:0.7` stands behind it."""

    name: str
    weight: float | None = None
    replay: bool = False


def parse_source(text: str, *, replay: bool = False) -> Source:
    """`zh.jsonl:0.7` is zh.jsonl with the weight 0.7; a file of that very name comes first.

    Raises:
        UsageError: the weight is not above 0.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Source(text, None, replay)
    try:
        weight = float(number)
    except ValueError:
        return Source(text, None, replay)
    if replay:
        raise UsageError(
            f"--replay-data {text}: a replay source has no weight", "--replay-share says how much is replayed"
        )
    if not 0 < weight < float("inf"):
        raise UsageError(f"--train-data {text}: the weight has to be above 0", "for example zh.jsonl:0.7")
    return Source(name, weight, replay)


def check_weights(sources: Sequence[Source]) -> None:
    """Either every source of `--train-data` has a weight, or none.

    Raises:
        UsageError: some have one.
    """
    ours = [source for source in sources if not source.replay]
    without = [source.name for source in ours if source.weight is None]
    if without and len(without) < len(ours):
        raise UsageError(
            f"--train-data {without[0]} has no weight", "give each source a weight, or none of them"
        )
    names = [source.name for source in sources]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise DataError(f"{doubled} is named twice", "name each source once; a weight repeats it: FILE:2")


def files_of(source: Source) -> list[tuple[str, str]]:
    """The files of a source: by what they are read, and how their rows name them."""
    found, _ = expand_sources([source.name])
    return [
        (f"{one.name}:{one.split}", one.name) if isinstance(one, HubDataset) else (str(one), str(one))
        for one in found
    ]


def rows_name(read_as: str) -> str:
    """How the rows of a file are named, by what it is read."""
    found, _ = expand_sources([read_as])
    return found[0].name if isinstance(found[0], HubDataset) else str(found[0])


def shares_of(
    most: int | None,
    sources: Sequence[Source],
    usable: Callable[[str, int], int],
    notices: list[str],
) -> dict[str, int] | None:
    """How many records of each file `--max-samples` takes, by the name of its rows; None where it is not given.

    Each file has the same share, or one by its source's weight. What a small file does not have goes to the others.

    Args:
        most: --max-samples. usable: how many records a file has, counted no further than a number.
        notices: takes a line that says the shares.
    """
    if most is None:
        return None
    named: list[tuple[str, str]] = []
    weights: list[float] = []
    for source in sources:
        files = files_of(source)
        named += files
        weights += [1.0 if source.weight is None else source.weight / len(files)] * len(files)
    if len(named) == 1:
        return {named[0][1]: most}
    sizes = [usable(read_as, most) for read_as, _ in named]
    shares = share_out(most, sizes, weights)
    if sum(sizes) > most:
        notices.append(shares_notice(most, [name for _, name in named], shares))
    return {name: share for (_, name), share in zip(named, shares, strict=True)}


def shares_notice(most: int, names: Sequence[str], shares: Sequence[int]) -> str:
    """What `--max-samples` takes of each file, as a line."""
    said = [f"{share:,} of {name}" for name, share in zip(names[:_NAMED], shares, strict=False)]
    more = f" and {sum(shares[_NAMED:]):,} of {len(names) - _NAMED} others" if len(names) > _NAMED else ""
    return f"--max-samples {most:,} is shared: {', '.join(said)}{more}"


_NAMED = 8  # files that the notice names


def share_out(total: int, sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Whole numbers by weight, none above its size, that add up to `total` or to all that there is."""
    found = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        able = [index for index, size in enumerate(sizes) if found[index] < size]
        whole = math.fsum(weights[index] for index in able)
        parts = [min(int(left * weights[index] / whole), sizes[index] - found[index]) for index in able]
        if not any(parts):  # fewer are left than there are files: one each, the heaviest first
            heaviest = sorted(range(len(able)), key=lambda place: -weights[able[place]])[:left]
            for place in heaviest:
                parts[place] = 1
        for index, part in zip(able, parts, strict=True):
            found[index] += part
            left -= part
    return found


def mix_rows(
    sources: Sequence[Source], sizes: Sequence[int], tokens: Sequence[int], drawn: Sequence[int], unit: str
) -> list[dict[str, Any]]:
    """What a mix is made of, for the plan and the report.

    Args:
        sizes: items that each source has. drawn: items that an epoch takes. unit: what they are.
    """
    return [
        {
            "source": source.name,
            "replay": source.replay,
            unit: size,
            "tokens": number,
            "share": quota / sum(drawn),
            "passes_an_epoch": quota / size if size else 0.0,
        }
        for source, size, number, quota in zip(sources, sizes, tokens, drawn, strict=True)
    ]


def source_numbers(sources: Sequence[Source]) -> Mapping[str, int]:
    """Which source each file belongs to, by the name of its rows."""
    return {name: number for number, source in enumerate(sources) for _, name in files_of(source)}


def passes_over(rows: Sequence[Mapping[str, Any]], epochs: float) -> dict[str, float]:
    """How often a run goes through each source of a mix, for its plan; nothing of a single source.

    Args:
        rows: of `mix_rows`.
    """
    if len(rows) < 2:
        return {}
    return {f"passes over {one['source']}": one["passes_an_epoch"] * epochs for one in rows}
