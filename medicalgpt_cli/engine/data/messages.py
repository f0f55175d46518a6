"""What a conversation is made of, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(TypedDict):
    """A call of a tool that an assistant makes. `arguments` is what the tool gets, an object."""

    name: str
    arguments: dict[str, Any]
    id: NotRequired[str]  # by which a tool's turn says what it answers


class Message(TypedDict):
    """A turn. What is not said stands not there: an assistant's turn without reasoning has no key `reasoning`."""

    role: Role
    content: str
    reasoning: NotRequired[str]  # what an assistant thought in front of its answer, without marks around it
    tool_calls: NotRequired[list[ToolCall]]  # that an assistant makes behind its content
    name: NotRequired[str]  # of a tool's turn: the tool that answers
    tool_call_id: NotRequired[str]  # of a tool's turn: the call that it answers
    weight: NotRequired[float]  # of an assistant's turn: its loss is multiplied by it, 0 is context only


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    at: str  # file:line
    id: str | None = None
    source: str = ""
    # of the functions that may be called: {"name", "description", "parameters": a JSON Schema}
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None  # what belongs together (a patient, a document), of `--group`


def conversation_from(value: Mapping[str, Any]) -> Conversation:
    """The conversation that `dataclasses.asdict` gave and JSON has carried."""
    return Conversation(**{**value, "messages": tuple(value["messages"]), "tools": tuple(value["tools"])})


@dataclass(frozen=True)
class Document:
    text: str
    at: str  # file:line
