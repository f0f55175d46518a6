"""The form of a template's calls, found from known calls that it has rendered: no list of families is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from medicalgpt_cli.engine.data.calls import CallFormat, CallReader, NotACall, after_space
from medicalgpt_cli.engine.data.messages import ToolCall

# Names and values that no template holds. Two calls differ, so that nothing of one is taken for the format.
PROBES: tuple[ToolCall, ...] = (
    {"name": "Zn7", "arguments": {"Zk7": "Zv7"}},
    {"name": "Zn8", "arguments": {"Zk8": "Zv8", "Zk9": "Zv9"}},
)
CHECKS: tuple[ToolCall, ...] = (
    {"name": "take_4", "arguments": {"how": 'as "said",\nonce', "much": [1, {"é": None}], "yes": {"a": 2.5}}},
    {"name": "Zn9", "arguments": {}},
    {"name": "Zn7", "arguments": {"Zk7": 7}},
)


def find_call_format(one: str, other: str, both: str) -> CallFormat | None:
    """The format of calls, from answers with the first of `PROBES`, with the second, and with both.

    `both` is "" where a template takes one call at once. None where the format cannot be found out.
    """
    first, second = PROBES
    found = _around_json(one, first) or _named(one, first) or _pairs(one, other, first, second)
    if found is None:
        return None
    kind, before, behind, more = found
    if kind == "list" or not both:
        return CallFormat(kind, open=before, close=behind, **more)
    gap = _gap(both, kind, behind, more)
    if gap is None:
        return None
    opening = _common(before[::-1], gap[::-1])[::-1]
    closing = _common(behind, gap.removesuffix(opening))
    between = gap.removesuffix(opening).removeprefix(closing)
    begin, end = before.removesuffix(opening), behind.removeprefix(closing)
    return CallFormat(kind, begin, opening, close=closing, between=between, end=end, **more)


_Found = tuple[
    Any, str, str, dict[str, Any]
]  # kind, text before a call, behind it, more fields of the format


def _around_json(text: str, call: ToolCall) -> _Found | None:
    for start, end, value in _values(text):
        if not (start < text.find(call["name"]) < end and start < text.find("Zk7") < end):
            continue
        listed = isinstance(value, list)
        said = value[0] if listed else value
        said = said.get("function", said) if isinstance(said, dict) else {}
        if not isinstance(said, dict):
            return None
        name = next((key for key, given in said.items() if given == call["name"]), None)
        asked = (call["arguments"], json.dumps(call["arguments"]))
        arguments = next((key for key, given in said.items() if given in asked), None)
        if name is None or arguments is None:
            return None
        keys = {"name_key": name, "arguments_key": arguments}
        return "list" if listed else "object", text[:start], text[end:], keys
    return None


def _named(text: str, call: ToolCall) -> _Found | None:
    before, name, rest = text.partition(call["name"])
    if not name:
        return None
    for start, end, value in _values(rest):
        if value == call["arguments"]:
            return "named", before, rest[end:], {"middle": rest[:start]}
    return None


def _pairs(one: str, other: str, first: ToolCall, second: ToolCall) -> _Found | None:
    """From a call with one argument and one with two."""
    single = re.fullmatch(rf"(.*?){first['name']}(.*?)Zk7(.*?)Zv7(.*)", one, re.DOTALL)
    double = re.fullmatch(rf"(.*?){second['name']}(.*?)Zk8(.*?)Zv8(.*?)Zk9(.*?)Zv9(.*)", other, re.DOTALL)
    if single is None or double is None:
        return None
    before, to_key, to_value, behind = single.groups()
    _, _, _, between, _, _ = double.groups()
    opens = _common(to_key[::-1], between[::-1])[::-1]
    closes = between.removesuffix(opens)
    if not opens.strip() or not to_value.strip() or not closes.strip() or not behind.startswith(closes):
        return None
    more = {"middle": to_key.removesuffix(opens), "pair": (opens, to_value, closes)}
    return "pairs", before, behind.removeprefix(closes), more


def _gap(both: str, kind: str, behind: str, more: Mapping[str, Any]) -> str | None:
    """What stands between two calls: behind the arguments of the first, up to what "open" ends at in the second."""
    second = PROBES[1]
    if kind == "object":
        ends = [(start, end) for start, end, value in _values(both) if isinstance(value, dict)]
        holding = [
            next(((start, end) for start, end in ends if mark in both[start:end]), None)
            for mark in (PROBES[0]["name"], second["name"])
        ]
        if holding[0] is None or holding[1] is None or holding[0] == holding[1]:
            return None
        return both[holding[0][1] : holding[1][0]]
    at = both.find(second["name"])
    if at < 0:
        return None
    if kind == "named":
        end = next((end for _, end, value in _values(both) if value == PROBES[0]["arguments"]), None)
    else:
        place = both.find("Zv7")
        end = None if place < 0 else place + len("Zv7") + len(more["pair"][2])
    return None if end is None or end > at else both[end:at]


def _values(text: str) -> Iterator[tuple[int, int, Any]]:
    """Each JSON object and list in a text: where it begins and ends, and what it is; the outer ones first."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[\[{]", text):
        try:
            value, end = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        yield match.start(), end, value


def _common(one: str, other: str) -> str:
    """The beginning that two texts share."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(mark for mark, _ in same)


def gives_back(form: CallFormat, texts: Collection[tuple[str, Sequence[ToolCall]]]) -> bool:
    """Whether a format reads the calls out of texts as they were written."""
    for text, calls in texts:
        reader, at = CallReader(form, None), 0
        found: list[ToolCall] = []
        try:
            while len(found) < len(calls):
                reader.forget()
                at = reader.after_between(text, at, True) if found else at
                some, at = reader.read(text, after_space(text, at), True)
                found += some
        except NotACall:
            return False
        plain = [{"name": one["name"], "arguments": one["arguments"]} for one in found]
        if plain != list(calls) or text[at:].strip():
            return False
    return True
