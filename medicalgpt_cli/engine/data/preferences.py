"""Pairs of answers, one of which was preferred, and an audit of them before anything is learnt."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medicalgpt_cli.engine.data.formats import (
    Counts,
    Message,
    answer_keys,
    detect_format,
    join_same_role,
    preference_prompt,
    rows_of,
    with_plain_answers,
)
from medicalgpt_cli.engine.data.readers import AS_FOUND, ReadOptions, Row
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


def load_pairs(
    sources: Sequence[str],
    counts: Counts,
    observer: Observer,
    *,
    margin_column: str | None = None,
    max_samples: int | None = None,
    reading: ReadOptions = AS_FOUND,
) -> list[Pair]:
    """Preference pairs of all sources in order; a pair from which nothing can be learnt is counted.

    Raises:
        DataError: a row is no preference pair, or nothing is left.
    """
    found: list[Pair] = []
    for row in rows_of(sources, counts, observer, reading=reading):
        if max_samples is not None and len(found) >= max_samples:
            break
        counts.read += 1
        pair = _pair_of(row, counts, margin_column)
        if pair is not None:
            found.append(pair)
    if not found:
        reasons = "; ".join(f"{number} skipped: {reason}" for reason, number in counts.skipped.most_common(3))
        raise DataError(f"{', '.join(sources)}: no pair to learn from", reasons or "the files are empty")
    return found


def _pair_of(row: Row, counts: Counts, margin_column: str | None) -> Pair | None:
    value, at = row.value, row.at
    if detect_format(value, at) != "preference":
        answer_keys(value if isinstance(value, dict) else {}, at)  # says what is missing
    better, worse = answer_keys(value, at)
    value = with_plain_answers(value, at)
    counts.formats.setdefault(row.path, "preference")
    answers = []
    for name in (better, worse):
        text = value[name]
        if text is None or (isinstance(text, str) and not text.strip()):
            counts.add_skip("an empty answer", at)
            return None
        if not isinstance(text, str):
            raise DataError(f"{name} is not text", "mend or remove this record", at=at)
        answers.append(text)
    messages = join_same_role(preference_prompt(value, at), at, counts)
    if messages and messages[-1]["role"] == "assistant":
        raise DataError(
            "the prompt ends with an answer", "the last turn in front of both answers is the user's", at=at
        )
    if not any(one["role"] == "user" and one["content"].strip() for one in messages):
        counts.add_skip("no question", at)
        return None
    if answers[0].strip() == answers[1].strip():
        counts.add_skip("both answers are the same", at)
        return None
    identifier = value.get("id")
    return Pair(
        tuple(messages),
        *answers,
        _margin(value, margin_column, at),
        at,
        row.path,
        None if identifier is None else str(identifier),
    )


def _margin(value: dict[str, Any], column: str | None, at: str) -> float | None:
    if column is None:
        return None
    margin = value.get(column)
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
            at=at,
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
    said = [[one["role"], " ".join(one["content"].split())] for one in messages if one["role"] != "system"]
    return hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).hexdigest()[:24]
