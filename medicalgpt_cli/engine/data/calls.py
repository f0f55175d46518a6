"""How calls of tools are spelt in a text, and how they are read back.

Where a `CallFormat` comes from: `call_formats.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medicalgpt_cli.engine.data.fields import object_of
from medicalgpt_cli.engine.data.messages import ToolCall
from medicalgpt_cli.engine.data.readers import parse_json
from medicalgpt_cli.errors import DataError

NAME = re.compile(r"[\w.:/-]{1,128}")  # of a tool
_NAME_KEYS, _ARGUMENT_KEYS = ("name",), ("arguments", "parameters")
_BRACKETS = re.compile(r'["\\\[\]{}]')


class NotACall(Exception):
    """What stands there is no call. `looks`: it looks like one, so somebody should hear of it."""

    def __init__(self, looks: bool = False) -> None:
        self.looks = looks


class NeedMore(Exception):
    """Whether it is a call shows only when more of the text is there."""


@dataclass(frozen=True)
class CallFormat:
    """The text around calls. White space in it is not taken literally.

    kind: "object" is one JSON object a call, `{"name": …, "arguments": {…}}`; "list" a JSON list of such; "named" a
    name, `middle` and the arguments as a JSON object; "pairs" a name, `middle`, and for each argument `pair[0]`, its
    key, `pair[1]`, its value, `pair[2]`, where a value that is no text is JSON.
    """

    kind: Literal["object", "list", "named", "pairs"]
    begin: str = ""  # in front of the first call
    open: str = ""  # in front of each call
    middle: str = ""
    close: str = ""  # behind each call
    between: str = ""  # two calls
    end: str = ""  # behind the last call
    name_key: str = "name"
    arguments_key: str = "arguments"
    pair: tuple[str, str, str] = ("", "", "")

    @property
    def bare(self) -> bool:
        """Whether no mark announces a call, so that the whole answer has to be one."""
        return not self.begin.strip() and not self.open.strip()

    @property
    def marks(self) -> str:
        """All that the template writes around names and arguments."""
        return " ".join((self.begin, self.open, self.middle, self.close, self.between, self.end, *self.pair))


# What medgpt writes where a template has no place for calls.
PLAIN = CallFormat("object", open="<tool_call>", close="</tool_call>")


def plain_call(call: Mapping[str, Any]) -> str:
    """A call in the plain form; `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""
    said = {"name": call["name"], "arguments": call["arguments"]}
    return f"{PLAIN.open}{json.dumps(said, ensure_ascii=False)}{PLAIN.close}"


# -- reading -----------------------------------------------------------------------------------------------


class CallReader:
    """Reads calls of one format out of a text that grows.

    Args:
        tools: those that were offered, in any of the shapes of `function_of`; a call of another is none. None: any name
            will do.
    """

    def __init__(self, form: CallFormat, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self.form = form
        self._tools = None if tools is None else {one["name"]: one for one in map(function_of, tools)}
        self._scanned: tuple[int, int, int, bool] = (-1, 0, 0, False)

    @property
    def firsts(self) -> tuple[str, ...]:
        """The marks with one of which calls begin; where the format is bare, those behind some text."""
        form = self.form
        marks = (form.between,) if form.bare else (form.begin, form.open)
        return tuple(one.split()[0] for one in marks if one.strip())

    def read(self, text: str, at: int, final: bool) -> tuple[list[ToolCall], int]:
        """The calls at a place of a text, one or several, and where what follows them begins.

        Raises:
            NotACall: there is none. NeedMore: that is not certain yet, which a `final` text never raises.
        """
        if self.form.bare:
            return self._read_all(text, _maybe(text, at, self.form.between, final), final)
        calls, at = self._read_one(text, _maybe(text, at, self.form.begin, final), final)
        return calls, _maybe(text, at, self.form.end, final)

    def after_between(self, text: str, at: int, final: bool) -> int:
        """Behind what stands between two calls, if another one follows there."""
        if not self.form.between.strip():
            return at
        place = _maybe(text, at, self.form.between, final)
        try:
            after_literal(text, place, self.form.open, final)
        except NotACall:
            return at
        return place

    def _read_all(self, text: str, at: int, final: bool) -> tuple[list[ToolCall], int]:
        found: list[ToolCall] = []
        while True:
            calls, at = self._read_one(text, at, final)
            found += calls
            at = after_space(text, at)
            if at == len(text):
                if not final:
                    raise NeedMore
                return found, at
            if text[at] in ";," and self.form.kind == "object":
                at = after_space(text, at + 1)
            if self.form.between.strip():
                at = after_literal(text, at, self.form.between, final)

    def _read_one(self, text: str, at: int, final: bool) -> tuple[list[ToolCall], int]:
        form = self.form
        at = after_literal(text, at, form.open, final)
        if form.kind in ("object", "list"):
            value, at = self._json(text, after_space(text, at), final, "{[")
            calls = [self._call_of(one) for one in (value if isinstance(value, list) else [value])]
            if not calls:
                raise NotACall(looks=not form.bare)
        elif form.kind == "named":
            name, at = self._name(text, at, final)
            arguments, at = self._json(text, after_space(text, at), final, "{")
            calls = [self._checked(name, arguments)]
        else:
            name, at = self._name(text, at, final)
            arguments, at = self._pairs(text, at, name, final)
            return [self._checked(name, arguments)], at
        return calls, self._closed(text, at, final)

    def _closed(self, text: str, at: int, final: bool) -> int:
        """Behind the mark that closes a call; it may be missing where nothing follows."""
        if final and not text[at:].strip():
            return len(text)
        try:
            return after_literal(text, at, self.form.close, final)
        except NotACall:
            raise NotACall(looks=True) from None

    def _name(self, text: str, at: int, final: bool) -> tuple[str, int]:
        """The name of a tool, and where the text behind `middle` begins."""
        at = after_space(text, at)
        match = NAME.match(text, at)
        if match is None:
            raise NotACall if final or text[at:] else NeedMore
        name = match[0]
        ends = match.end() == len(text)
        mark = self.form.middle.strip()
        cut = name.find(mark) if mark else -1
        if cut > 0:  # the mark itself could be part of a name
            name, ends = name[:cut], False
        known = self._tools is None or name in self._tools
        if ends and final:
            raise NotACall
        if ends:
            if self._tools is not None and not any(one.startswith(name) for one in self._tools):
                raise NotACall(looks=not self.form.bare)
            raise NeedMore
        if not known:
            raise NotACall(looks=not self.form.bare)
        if not mark and self.form.middle and self.form.kind == "named" and text[at + len(name)] not in "\n ":
            raise NotACall
        return name, after_literal(text, at + len(name), self.form.middle, final)

    def _json(self, text: str, at: int, final: bool, opens: str) -> tuple[Any, int]:
        if at == len(text):
            raise NotACall if final else NeedMore
        if text[at] not in opens:
            raise NotACall
        end = self._end_of_json(text, at)
        if end is None:
            if not final:
                raise NeedMore
            raise NotACall(looks=not self.form.bare or '"name"' in text)
        try:
            return _loads(text[at:end]), end
        except ValueError:
            raise NotACall(looks=not self.form.bare) from None

    def _end_of_json(self, text: str, at: int) -> int | None:
        """Behind the bracket that closes the one at `at`; None where it is not there yet."""
        start, place, depth, quoted = self._scanned
        if start != at or place > len(text):
            place, depth, quoted = at, 0, False
        while match := _BRACKETS.search(text, place):
            mark, place = match[0], match.end()
            if mark == "\\":
                if place == len(text):
                    place -= 1
                    break
                place += 1
            elif mark == '"':
                quoted = not quoted
            elif not quoted:
                depth += 1 if mark in "[{" else -1
                if depth <= 0:
                    return place
        self._scanned = (at, place, depth, quoted)
        return None

    def forget(self) -> None:
        """The text begins at another place from now on."""
        self._scanned = (-1, 0, 0, False)

    def _pairs(self, text: str, at: int, name: str, final: bool) -> tuple[dict[str, Any], int]:
        opens, middle, closes = (_flexible(one) for one in self.form.pair)
        mark = self.form.close.split()[-1]
        end = text.find(mark, at)
        if end < 0:
            raise NotACall(looks=True) if final else NeedMore
        end += len(mark)
        follows = rf"(?=\s*(?:{opens}|{_flexible(self.form.close)}))"
        inside = re.compile(rf"\s*{opens}(.*?){middle}(.*?){closes}{follows}", re.DOTALL)
        found: dict[str, Any] = {}
        while match := inside.match(text, at, end):
            key = match[1].strip()
            found[key] = _typed(match[2], self._type(name, key))
            at = match.end()
        try:
            return found, after_literal(text[:end], at, self.form.close, True)
        except NotACall:
            raise NotACall(looks=True) from None

    def _type(self, name: str, key: str) -> Any:
        """What JSON Schema says about an argument; None where nothing is known."""
        parameters = (self._tools or {}).get(name, {}).get("parameters") or {}
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        schema = properties.get(key) if isinstance(properties, dict) else None
        return schema.get("type") if isinstance(schema, dict) else None

    def _call_of(self, value: Any) -> ToolCall:
        if not isinstance(value, dict):
            raise NotACall(looks=not self.form.bare)
        inner = value.get("function")
        said = inner if isinstance(inner, dict) else value
        name = next((said[key] for key in (self.form.name_key, *_NAME_KEYS) if key in said), None)
        keys = [key for key in (self.form.arguments_key, *_ARGUMENT_KEYS) if key in said]
        if self.form.bare and (name is None or not keys):
            raise NotACall  # an answer in JSON
        arguments = said[keys[0]] if keys else {}
        if isinstance(arguments, str):
            try:
                arguments = _loads(arguments)
            except ValueError:
                raise NotACall(looks=True) from None
        call = self._checked(name, arguments)
        if isinstance(value.get("id"), str) and value["id"].isprintable():
            call["id"] = value["id"]
        return call

    def _checked(self, name: Any, arguments: Any) -> ToolCall:
        if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict):
            raise NotACall(looks=True)
        if self._tools is not None and name not in self._tools:
            raise NotACall(looks=True)
        try:
            return {"name": name, "arguments": object_of(arguments, "arguments", "")}
        except DataError:  # nothing that can be written as JSON, or rendered again
            raise NotACall(looks=True) from None


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as name, description and parameters, whether or not it is wrapped as `{"type", "function"}`."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def after_literal(text: str, at: int, literal: str, final: bool) -> int:
    """Where a text goes on behind a literal, whatever white space is in it and around it.

    Raises:
        NotACall: something else stands there. NeedMore: the text ends inside it.
    """
    for part in literal.split():
        at = after_space(text, at)
        if text.startswith(part, at):
            at += len(part)
        elif part.startswith(text[at:]) and not final:
            raise NeedMore
        else:
            raise NotACall
    return at


def _maybe(text: str, at: int, literal: str, final: bool) -> int:
    """Behind a literal if it stands there, else where it would."""
    try:
        return after_literal(text, at, literal, final)
    except NotACall:
        return at


def _flexible(literal: str) -> str:
    """A pattern for a literal with any white space inside it; a line end around it may be missing, and is no more."""
    before, behind = (r"\n?" if one == "\n" else "" for one in (literal[:1], literal[-1:]))
    return before + r"\s*".join(map(re.escape, literal.split())) + behind


def _loads(text: str) -> Any:
    """
    Raises:
        ValueError: this is no JSON, or none that can be trusted: a key stands twice, a number is NaN.
    """
    try:
        return parse_json(text)
    except DataError as problem:
        raise ValueError(problem.message) from None


def _typed(text: str, kind: Any) -> Any:
    """A value of the form "pairs", in which texts stand as they are and all else as JSON."""
    if kind == "string":
        return text
    try:
        return _loads(text)
    except ValueError:
        return text
