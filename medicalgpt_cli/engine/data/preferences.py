"""Pairs of answers, one of which was preferred, and an audit of them before anything is learnt."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medicalgpt_cli.engine.data.calls import plain_call
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.fields import Fields
from medicalgpt_cli.engine.data.formats import join_same_role, read_all, why_nothing
from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.naming import keys_found
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import Record, read_record
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError


@dataclass(frozen=True)
class Pair:
    messages: tuple[Message, ...]  # the prompt: everything up to the answer that is judged
    chosen: str
    rejected: str
    margin: float | None
    at: str  # file:line
    source: str
    id: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None


def load_pairs(
    sources: Sequence[str],
    counts: Counts,
    observer: Observer,
    *,
    margin_column: str | None = None,
    shares: Mapping[str, int] | None = None,
) -> list[Pair]:
    """Preference pairs of all sources in order; a pair from which nothing can be learnt is counted.

    Args:
        shares: how many are taken of each file (`read_all`).

    Raises:
        DataError: a row is no preference pair, or nothing is left.
    """

    found = list(_pairs(sources, counts, observer, margin_column, shares=shares))
    if not found:
        raise DataError(f"{', '.join(sources)}: no pair to learn from", why_nothing(counts))
    return found


def usable_pairs(name: str, most: int, rules: Counts, margin_column: str | None) -> int:
    """How many pairs a file has, counted up to a number. `rules`: counts with the rules by which it is read."""
    return sum(1 for _ in _pairs([name], rules.fresh(), Observer(), margin_column, most=most))


def _pairs(
    sources: Sequence[str], counts: Counts, observer: Observer, margin_column: str | None, **limits: Any
) -> Iterator[Pair]:
    def make(row: Row) -> list[Pair]:
        record = read_record(row, counts, used=(margin_column,) if margin_column else ())
        return [] if record is None else to_pairs(record, row, counts, margin_column)

    return read_all(sources, counts, observer, make, **limits)


def to_pairs(record: Record, row: Row, counts: Counts, margin_column: str | None = None) -> list[Pair]:
    """The pairs of a record: one, or of a ranking one for each two answers of different rank.

    Raises:
        DataError: it has no answers to compare, or no margin where one is asked for.
    """
    at = row.at
    if not record.answers:
        value = row.value if isinstance(row.value, dict) else {}
        without = "chosen" in Fields(value, at)
        raise DataError(
            "a preference pair without rejected"
            if without
            else f"no preference pair; keys found: {keys_found(value, at)}",
            "expected: conversations, prompt or question, with chosen and rejected",
            at=at,
        )
    if any(not answer.strip() for answer in record.answers):
        counts.add_skip("an empty answer", at)
        return []
    messages = join_same_role(record.messages, at, counts)
    if messages and messages[-1]["role"] == "assistant":
        raise DataError(
            "the prompt ends with an answer", "the last turn in front of both answers is the user's", at=at
        )
    if not any(one["role"] == "user" and one["content"].strip() for one in messages):
        counts.add_skip("no question", at)
        return []
    margin = margin_of(row, margin_column)
    ranked = [*zip(record.answers, record.ranks, strict=True)]
    pairs = [
        Pair(tuple(messages), better, worse, margin, at, row.path, record.id, record.tools, record.group)
        for (better, first), (worse, second) in itertools.combinations(ranked, 2)
        if first < second and better.strip() != worse.strip()
    ]
    if not pairs:
        counts.add_skip("both answers are the same" if len(ranked) == 2 else "no two answers differ", at)
    elif len(ranked) > 2:
        counts.add_merge("a ranking of several answers, as pairs", at)
    return pairs


def margin_of(row: Row, column: str | None) -> float | None:
    """How much better the chosen answer of a row is, as its `column` says; None where no column is named.

    Raises:
        DataError: it is no number of at least 0.
    """
    if column is None:
        return None
    margin: Any = row.value.get(column) if isinstance(row.value, dict) else None
    if isinstance(margin, str):  # of a table
        try:
            margin = float(margin)
        except ValueError:
            margin = None
    number = isinstance(margin, int | float) and not isinstance(margin, bool) and math.isfinite(margin)
    if not number or margin < 0:
        raise DataError(
            f"{column} is no number of at least 0",
            "--margin-column names the column with each pair's margin",
            at=row.at,
        )
    return float(margin)


def audit(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What the pairs could teach that nobody meant: repeated, contradicting, and judged by length.

    `longer_chosen` is the share of pairs with answers of different length whose chosen answer is the longer
    one: the accuracy of the rule "longer wins". Lengths are in characters.
    """
    directions: dict[tuple[Any, ...], set[bool]] = defaultdict(set)
    copies: Counter[tuple[Any, ...]] = Counter()
    for pair in pairs:
        prompt = tuple((one["role"], one["content"]) for one in pair.messages)
        ordered = (prompt, *sorted((pair.chosen, pair.rejected)))
        directions[ordered].add(pair.chosen < pair.rejected)
        copies[(prompt, pair.chosen, pair.rejected)] += 1
    differing = [pair for pair in pairs if len(pair.chosen) != len(pair.rejected)]
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in differing)
    return {
        "pairs": len(pairs),
        "prompts": len({prompt_hash(pair.messages) for pair in pairs}),
        "repeated": len(pairs) - len(copies),
        "contradicting": sum(len(seen) > 1 for seen in directions.values()),
        "longer_chosen": longer / len(differing) if differing else None,
        "mean_characters_chosen": sum(len(pair.chosen) for pair in pairs) / max(len(pairs), 1),
        "mean_characters_rejected": sum(len(pair.rejected) for pair in pairs) / max(len(pairs), 1),
    }


def audit_notices(found: dict[str, Any]) -> list[str]:
    """The audit as lines for the screen and the report."""
    lines = [f"{found['pairs']:,} pairs over {found['prompts']:,} prompts"]
    if found["repeated"]:
        lines.append(f"{found['repeated']:,} pairs repeat another one")
    if found["contradicting"]:
        lines.append(
            f"{found['contradicting']:,} pairs stand there in both orders: they contradict each other"
        )
    if found["longer_chosen"] is not None:
        lines.append(
            f"where lengths differ, the longer answer is the chosen one in {100 * found['longer_chosen']:.0f} % "
            f"({found['mean_characters_chosen']:,.0f} characters against {found['mean_characters_rejected']:,.0f})"
        )
    return lines


def prompt_hash(messages: Sequence[Message]) -> str:
    """A name for a prompt that does not tell what it says; equal for prompts that differ in spacing only."""
    said = [
        [one["role"], " ".join(one["content"].split()), *map(plain_call, one.get("tool_calls", ()))]
        for one in messages
        if one["role"] != "system"
    ]
    return hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).hexdigest()[:24]
