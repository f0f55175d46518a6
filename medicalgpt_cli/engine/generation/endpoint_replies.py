"""What another server's reply says: reasoning and text, calls of tools whole or in pieces, and the answer of both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from medicalgpt_cli.engine.data.tools import Delta
from medicalgpt_cli.engine.generation.answer_reader import content_of
from medicalgpt_cli.engine.generation.decoding import Answer
from medicalgpt_cli.engine.generation.wire import call_from_wire
from medicalgpt_cli.errors import EnvironmentFailure

# Bytes of one reply: an event for each of 100,000 tokens takes 30 MB.
_LONGEST_REPLY = 64 * 2**20


def deltas_of(message: dict[str, Any]) -> list[Delta]:
    """Reasoning and text of a message, or of a piece of one. Servers call the former by one of two names."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    text = message.get("content") if "content" in message else message.get("text")
    found: list[Delta] = []
    if isinstance(reasoning, str) and reasoning:
        found.append(Delta("reasoning", _whole_characters(reasoning)))
    if isinstance(text, str) and text:
        found.append(Delta("content", _whole_characters(text)))
    return found


def _whole_characters(text: str) -> str:
    """JSON can spell half a character, which no file and no client takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def add_calls(calls: dict[int, dict[str, Any]], pieces: Any) -> None:
    """Put the pieces of calls to those that came before."""
    for place, piece in enumerate(pieces if isinstance(pieces, list) else ()):
        if not isinstance(piece, dict):
            continue
        index = piece.get("index") if isinstance(piece.get("index"), int) else place
        call = calls.setdefault(index, {"function": {"name": "", "arguments": ""}})
        if isinstance(piece.get("id"), str):
            call["id"] = piece["id"]
        function = piece.get("function")
        for key in ("name", "arguments"):
            if isinstance(function, dict) and isinstance(function.get(key), str):
                call["function"][key] += function[key]


def deltas_of_calls(calls: Sequence[Any]) -> list[Delta]:
    """Calls of a server; one that is none stays as text, so that nothing is lost."""
    found: list[Delta] = []
    for value in calls:
        call = call_from_wire(value)
        if call is None:
            found.append(Delta("content", _whole_characters(json.dumps(value, ensure_ascii=False))))
        else:
            found.append(Delta("tool_call", call=call))
    return found


def put_together(deltas: Sequence[Delta], reason: str, usage: dict[str, Any], counted: int = 0) -> Answer:
    """The answer that came in pieces.

    Args:
        counted: its tokens, where the server does not count them.
    """
    return Answer(
        content_of(deltas),
        [],
        "length" if reason == "length" else "stop",
        usage.get("prompt_tokens") or 0,
        usage.get("completion_tokens") or counted,
        reasoning="".join(one.text for one in deltas if one.kind == "reasoning") or None,
        tool_calls=tuple(one.call for one in deltas if one.call is not None),
    )


def json_of(reply: httpx.Response) -> dict[str, Any]:
    try:
        found = json.loads(b"".join(_bounded(reply)))
    except (ValueError, RecursionError):
        found = None
    except httpx.HTTPError as problem:
        raise EnvironmentFailure(f"the server broke off ({type(problem).__name__})", "ask again") from None
    if not isinstance(found, dict):
        raise EnvironmentFailure("the server's answer is no JSON object", "is the address that of an API?")
    return found


def events_of(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """The objects of server-sent events up to `[DONE]`."""
    try:
        for line in _lines(reply):
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if isinstance(event, dict):
                yield event
    except (ValueError, RecursionError):
        raise EnvironmentFailure(
            "the server's answer is not JSON", "is the address that of an API?"
        ) from None
    except httpx.HTTPError as problem:
        raise EnvironmentFailure(f"the server broke off ({type(problem).__name__})", "ask again") from None


def _bounded(reply: httpx.Response) -> Iterator[bytes]:
    """The parts of a reply, unpacked, up to the bound.

    Raises:
        EnvironmentFailure: there is more.
    """
    count = 0
    for chunk in reply.iter_bytes():
        count += len(chunk)
        if count > _LONGEST_REPLY:
            raise EnvironmentFailure(
                f"the server's answer does not end within {_LONGEST_REPLY // 2**20} MiB",
                "is the address that of an API?",
            )
        yield chunk


def _lines(reply: httpx.Response) -> Iterator[bytes]:
    """httpx's own lines also end at characters that may stand inside a JSON text."""
    left = b""
    for chunk in _bounded(reply):
        *whole, left = (left + chunk).split(b"\n")
        yield from whole
    yield left
