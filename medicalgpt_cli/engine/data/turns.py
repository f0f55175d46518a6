"""The turns of a conversation as people write them down: ShareGPT's, OpenAI's, and mixtures of both."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from medicalgpt_cli.engine.data.counts import Place
from medicalgpt_cli.engine.data.fields import EMPTY, Fields, kind_of, object_of, text_of
from medicalgpt_cli.engine.data.messages import Message, Role, ToolCall
from medicalgpt_cli.engine.data.naming import keys_found, role_name
from medicalgpt_cli.engine.data.readers import parse_json
from medicalgpt_cli.engine.data.reasoning import split_reasoning
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.settings.fields import did_you_mean

ROLES: dict[str, Role] = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool", "tool_response": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles whose text is a call
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")
_MEDIA_PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image"), "images"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url"), "videos"),
    **dict.fromkeys(("file", "input_file"), "files"),
}


_PAIRS = (("human", "assistant"), ("user", "assistant"), ("question", "answer"), ("input", "output"))
# A turn that is a text with its speaker in front of it (HuatuoGPT's).
_ASKS = ("问", "患者", "病人", "user", "human", "patient")
_SPOKEN = re.compile(
    r"\s*(问|患者|病人|答|医生|user|human|patient|assistant|doctor|gpt)\s*[:：](.*)", re.S | re.I
)


def _pair_of(turn: Any) -> tuple[str, str] | None:
    """The keys of a turn that is a question with its answer."""
    if not isinstance(turn, dict) or "role" in turn or "from" in turn:
        return None
    return next((pair for pair in _PAIRS if pair[0] in turn and pair[1] in turn), None)


class NotUsable(Exception):
    """A record that is right and of no use here; the reason is counted."""


def media_reason(kind: str) -> str:
    return f"it has {kind}, which a model of texts cannot take in"


class Turns:
    """The messages of a list of turns, and the keys that nothing was made of.

    Raises:
        DataError: a turn contradicts its format. NotUsable: a turn has images, audio or videos.
    """

    def __init__(self, turns: Any, name: str, at: str, ignore: Collection[str] = ()):
        self.at, self.ignore = at, ignore
        self.left: list[tuple[Place, str]] = []
        self.read: list[tuple[Place, str, bool]] = []
        if not isinstance(turns, list | tuple):
            raise DataError(f"{name} is {kind_of(turns)}, not a list of turns", _SHAPE, at=at)
        self.messages: list[Message] = []
        for number, turn in enumerate(turns, 1):
            if pair := _pair_of(turn):
                self._exchange(turn, pair, number)
            elif isinstance(turn, str) and (spoken := _SPOKEN.match(turn)):
                role: Role = "user" if spoken[1].casefold() in _ASKS else "assistant"
                self.messages.append(
                    {"role": role, "content": text_of(spoken[2].strip(), f"turn {number}", at)}
                )
            else:
                self.messages.append(self._turn(turn, number))

    def _exchange(self, turn: dict[str, Any], pair: tuple[str, str], number: int) -> None:
        """A question and its answer in one object (Firefly's, XTuner's), perhaps with a system message."""
        for role, key in (("system", "system"), ("user", pair[0]), ("assistant", pair[1])):
            if turn.get(key) not in (None, "") or (key in pair and key in turn):
                text = "" if turn[key] is None else text_of(turn[key], f"{key} of turn {number}", self.at)
                inner = {"role": role, "content": text}
                self.messages.append(self._turn(inner, number))
        self.left += [("turn", str(key)) for key in turn if key not in (*pair, "system")]

    def _turn(self, turn: Any, number: int) -> Message:
        if not isinstance(turn, dict):
            raise DataError(f"turn {number} is {kind_of(turn)}, not an object", _SHAPE, at=self.at)
        fields = Fields(turn, self.at, "turn", self.ignore)
        said = fields.take("role")
        calls = self._calls(fields, number)
        if said is None or not ("content" in fields or "text" in fields or calls):
            missing = "role" if said is None else "content"
            raise DataError(
                f"turn {number} has no {missing}", f"keys found: {keys_found(turn, self.at)}", at=self.at
            )
        role = self._role(said, number)
        text, reasoning = self._content(fields, number)
        if isinstance(said, str) and said.casefold() in _CALLS and not calls:
            calls, text = self._call_in_text(text, number), ""
        message: Message = {"role": role, "content": text}
        if role == "assistant":
            self._of_an_answer(message, fields, reasoning, calls, number)
        elif calls:
            raise DataError(
                f"turn {number} calls a tool, and is not the assistant's", "check its role", at=self.at
            )
        if role == "tool":
            for key in ("name", "tool_call_id"):
                if fields.take(key) is not None:
                    message[key] = text_of(fields[key], fields.name(key), self.at)
        if role != "assistant" and fields.peek("weight") in (0, False):
            fields.take("weight")  # there is no loss on it
        self.left += fields.left
        self.read += fields.read
        return message

    def _of_an_answer(
        self, message: Message, fields: Fields, apart: str, calls: list[ToolCall], number: int
    ) -> None:
        given = fields.text("reasoning") or apart
        inline, content = split_reasoning(message["content"])
        if given and inline and given.strip() != inline.strip():
            raise DataError(
                f"turn {number} has its reasoning twice, in {fields.name('reasoning')} and in its content",
                "keep one of them",
                at=self.at,
            )
        message["content"] = content
        if given or inline:
            message["reasoning"] = given or inline or ""
        if calls:
            message["tool_calls"] = calls
        weight = fields.weight()
        if weight is not None and weight != 1:
            message["weight"] = weight

    def _role(self, role: Any, number: int) -> Role:
        if isinstance(role, str) and role.strip().casefold() in ROLES:
            return ROLES[role.strip().casefold()]
        known = f"known roles: {', '.join(ROLES)}"
        if not isinstance(role, str):
            raise DataError(f"the role of turn {number} is {kind_of(role)}, not text", known, at=self.at)
        name, near = role_name(role, self.at), did_you_mean(role.casefold(), ROLES)
        word = f"the unknown role {name}" if name else "an unknown role"
        raise DataError(f"turn {number} has {word}", f"did you mean {near}?" if near else known, at=self.at)

    # -- content -------------------------------------------------------------------------------------------

    def _content(self, fields: Fields, number: int) -> tuple[str, str]:
        """(text, reasoning that stands in a part of its own). Null is no text."""
        meaning = "content" if "content" in fields or "text" not in fields else "text"
        content = fields.take(meaning)
        if content is None:
            return "", ""
        if isinstance(content, str):
            return text_of(content, f"turn {number}", self.at), ""
        if not isinstance(content, list):
            raise DataError(
                f"turn {number} is {kind_of(content)}, not text", "mend or remove this record", at=self.at
            )
        texts, reasoning = [], []
        for place, part in enumerate(content, 1):
            kind, text = self._part(part, number, place)
            (reasoning if kind in _REASONING_PARTS else texts).append(text)
        return "".join(texts), "\n".join(reasoning)

    def _part(self, part: Any, number: int, place: int) -> tuple[str, str]:
        where = f"part {place} of turn {number}"
        if not isinstance(part, dict):
            raise DataError(f"{where} is {kind_of(part)}, not an object", _PART, at=self.at)
        fields = Fields(part, self.at, "part", self.ignore)
        kind = fields.take("type")
        if isinstance(kind, str) and kind in _MEDIA_PARTS:
            raise NotUsable(media_reason(_MEDIA_PARTS[kind]))
        if kind not in (*_TEXT_PARTS, *_REASONING_PARTS):
            named = role_name(kind, self.at) if isinstance(kind, str) else None
            raise DataError(
                f"{where} is of {f'the type {named}' if named else 'an unknown type'}", _PART, at=self.at
            )
        meanings = [*(["reasoning"] if kind in _REASONING_PARTS else []), "text", "content"]
        meaning = next((one for one in meanings if one in fields), None)
        if meaning is None:
            raise DataError(f"{where} has no text", _PART, at=self.at)
        text = fields.text(meaning) or ""
        self.left += fields.left
        self.read += fields.read
        return kind, text

    # -- calls ---------------------------------------------------------------------------------------------

    def _calls(self, fields: Fields, number: int) -> list[ToolCall]:
        calls, single = (fields.listed(key) for key in ("tool_calls", "function_call"))  # the latter is older
        calls = [] if calls in EMPTY else calls
        if not isinstance(calls, list):
            raise DataError(f"tool_calls of turn {number} is {kind_of(calls)}, not a list", _CALL, at=self.at)
        return [self._call(call, number) for call in [*calls, *([] if single in EMPTY else [single])]]

    def _call_in_text(self, text: str, number: int) -> list[ToolCall]:
        try:
            value = parse_json(text)
        except DataError:
            raise DataError(
                f"turn {number} is a call of a tool, and its text is no JSON", _CALL, at=self.at
            ) from None
        return [self._call(call, number) for call in (value if isinstance(value, list) else [value])]

    def _call(self, call: Any, number: int) -> ToolCall:
        if isinstance(call, str):
            raise DataError(f"a call of turn {number} is text, not an object", _CALL, at=self.at)
        if not isinstance(call, dict):
            raise DataError(f"a call of turn {number} is {kind_of(call)}, not an object", _CALL, at=self.at)
        inner = call.get("function", call)
        inner = inner if isinstance(inner, dict) else {}
        name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments) if arguments.strip() else {}
            except DataError as problem:
                what = f"the arguments of a call of turn {number}: {problem.message}"
                raise DataError(what, problem.hint, at=self.at) from None
        if not isinstance(name, str) or not name or not isinstance(arguments, dict | None):
            raise DataError(
                f"a call of turn {number} has no name with an object of arguments", _CALL, at=self.at
            )
        found: ToolCall = {"name": text_of(name, "name", self.at), "arguments": {}}
        if arguments:
            found["arguments"] = object_of(arguments, f"the arguments of a call of turn {number}", self.at)
        inside = {"name", "arguments" if "arguments" in inner else "parameters"}
        around = {"function", "id"} if isinstance(call.get("id"), str) else {"function"}
        if "id" in around:
            found["id"] = text_of(call["id"], "id", self.at)
        self.left += unused_of_function(call, inner, around, inside)
        return found


def unused_of_function(
    outer: dict[str, Any], inner: dict[str, Any], around: set[str], inside: set[str]
) -> list[tuple[Place, str]]:
    """Keys of a call or a tool that are not used, of an object with a `function` in it or of one without.

    Args:
        around: the keys that are used of the outer object. inside: those of the function.
    """
    if outer.get("type") == "function":
        around = around | {"type"}
    if outer is inner:
        return [("tool call", str(key)) for key in outer if key not in around | inside]
    left = [key for key in outer if key not in around] + [key for key in inner if key not in inside]
    return [("tool call", str(key)) for key in left]


_SHAPE = '[{"role": …, "content": …}, …]'
_PART = '{"type": "text", "text": …}'
_CALL = '{"name": …, "arguments": {…}}'
