"""Messages, tools and calls in OpenAI's shape, for the wire and for files of conversations, and as text for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from medicalgpt_cli.engine.data.calls import plain_call
from medicalgpt_cli.engine.data.messages import Message, ToolCall
from medicalgpt_cli.engine.data.reasoning import written_inline
from medicalgpt_cli.engine.data.tool_messages import with_ids


def to_wire(message: Message) -> dict[str, Any]:
    """A message as OpenAI's interface and `medgpt sft` read it; the arguments of a call are JSON text."""
    found: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    if message.get("reasoning"):
        found["reasoning_content"] = message["reasoning"]
    if message.get("tool_calls"):
        found["content"] = message["content"] or None
        found["tool_calls"] = [call_to_wire(call) for call in message["tool_calls"]]
    for key in ("name", "tool_call_id"):
        if message.get(key):
            found[key] = message[key]
    return found


def conversation_to_wire(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The same of a conversation. Each call has an id, and each result that of its call."""
    return [to_wire(one) for one in with_ids(messages, short=False)]


def call_to_wire(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    named = {"id": call["id"]} if "id" in call else {}
    return {**named, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def with_call_ids(
    calls: Sequence[ToolCall], answer: str, history: Sequence[Mapping[str, Any]] = ()
) -> tuple[ToolCall, ...]:
    """The calls of an answer, each with an id of its own: the one that the model gave it where that is new.

    Args:
        answer: what is different for each answer; the same answer has the same ids.
    """
    used = {call.get("id") for message in history for call in message.get("tool_calls", ())}
    found: list[ToolCall] = []
    for number, call in enumerate(calls):
        given = call.get("id")
        if not given or given in used:
            given = "call_" + hashlib.sha256(f"{answer}:{number}".encode()).hexdigest()[:24]
        used.add(given)
        found.append({**call, "id": given})
    return tuple(found)


def finish_reason(reason: str, calls: Sequence[ToolCall]) -> str:
    """OpenAI's word for why an answer ended."""
    return "tool_calls" if calls and reason == "stop" else reason


def call_from_wire(value: Any) -> ToolCall | None:
    """A call of a server's answer; None where it has no name, or no object of arguments."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict | None):
        return None
    call: ToolCall = {"name": function["name"], "arguments": arguments or {}}
    if isinstance(value.get("id"), str):
        call["id"] = value["id"]
    return call


def as_text(message: Message, *, reasoning: bool = True) -> str:
    """All that an assistant's turn says as one text, for people and rules: thoughts, answer, a line for each call."""
    lines = [message["content"]] if message["content"] or not message.get("tool_calls") else []
    text = "\n".join([*lines, *map(plain_call, message.get("tool_calls", ()))])
    thoughts = message.get("reasoning") if reasoning else None
    return written_inline(thoughts, text) if thoughts else text
