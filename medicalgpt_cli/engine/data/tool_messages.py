"""Tools, calls and results as a chat template takes them; a plain form of them where it has no place for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from medicalgpt_cli.engine.data.call_formats import CHECKS, PROBES, find_call_format, gives_back
from medicalgpt_cli.engine.data.calls import PLAIN, CallFormat, function_of, plain_call
from medicalgpt_cli.engine.data.messages import Message, ToolCall

_RESULT = ("<tool_response>", "</tool_response>")
_PROBE_TOOL = {"name": "Zt7", "description": "é"}
_QUESTION = {"role": "user", "content": "a"}


@dataclass(frozen=True)
class ToolFacts:
    """What a chat template does with tools, found by using it.

    way: how calls are handed over: their arguments as an object, as JSON text, or each call as an assistant's turn
    whose `metadata` is the name of the tool (GLM-4); None, the template has no place for calls or their results.
    """

    lists: bool  # it writes the tools that may be called
    way: Literal["object", "text", "metadata"] | None
    content: str | None  # what a call without text has as content
    beside: bool  # text in front of a call is rendered
    several: bool  # a turn may have several calls
    short_ids: bool  # the id of a call has nine letters and digits
    form: CallFormat | None  # how calls are read back; None where that could not be found out
    end: str  # the special token behind a call, "" where it is that of any turn
    example: str  # a call as the template writes it
    escapes: bool = False  # it writes JSON with escapes for all but ASCII


NO_TOOLS = ToolFacts(False, None, "", True, True, False, PLAIN, "", "")


# -- what a template does ----------------------------------------------------------------------------------


def find_tools(render: Callable[..., str], before: str, behind: str, special: Sequence[str]) -> ToolFacts:
    """
    Args:
        render: renders messages, "" where the template refuses them. before, behind: what it writes in front of an
            answer to `_QUESTION` and behind it. special: the special tokens.
    """
    tools = as_functions([_PROBE_TOOL])
    listed = render(_QUESTION, generation=True, tools=tools)
    lists, escapes = "Zt7" in listed, "\\u00e9" in listed
    for way in ("object", "text", "metadata"):
        for content in ("", None):
            for short in (False, True):
                facts = ToolFacts(lists, way, content, True, True, short, None, "", "", escapes)
                if _takes(render, tools, facts):
                    return _more(render, tools, facts, before, behind, special)
    return ToolFacts(lists, None, "", True, True, False, PLAIN, "", "", escapes)


def _turns(
    facts: ToolFacts, *calls: ToolCall, text: str = "", result: str | None = None
) -> list[dict[str, Any]]:
    named: list[ToolCall] = [{**call, "id": f"call_Zq7x{number}"} for number, call in enumerate(calls)]
    said: list[Message] = [{"role": "assistant", "content": text, "tool_calls": named}]
    if result is not None:
        said += [{"role": "tool", "content": result} for _ in calls]
    return native_turns(facts, with_ids(said, short=facts.short_ids))


def _takes(render: Callable[..., str], tools: list[dict[str, Any]], facts: ToolFacts) -> bool:
    """Whether name, arguments and result of a call are rendered, the arguments neither quoted nor as Python's."""
    text = render(_QUESTION, *_turns(facts, PROBES[0], result="Zx7"), tools=tools)
    holds = all(one in text for one in ("Zn7", "Zk7", "Zv7", "Zx7"))
    return holds and "{'Zk7'" not in text and '\\"Zk7' not in text


def _more(
    render: Callable[..., str],
    tools: list[dict[str, Any]],
    facts: ToolFacts,
    before: str,
    behind: str,
    special: Sequence[str],
) -> ToolFacts:
    asked = render(_QUESTION, tools=tools)
    prompt = render(_QUESTION, generation=True, tools=tools)
    header = before.removeprefix(render(_QUESTION))

    def answer(*calls: ToolCall, **more: Any) -> str:
        whole = render(_QUESTION, *_turns(facts, *calls, **more), tools=tools)
        start = asked + header
        return whole.removeprefix(start if whole.startswith(start) else prompt)

    one = answer(PROBES[0])
    follows = answer(PROBES[0], result="Zx7").removeprefix(one)
    end = _end(one, follows, behind, special)

    def said(*calls: ToolCall) -> str:
        return answer(*calls).rstrip().removesuffix(end or behind.strip()).rstrip()

    both = said(*PROBES)
    several = "Zv7" in both and "Zv9" in both
    form = find_call_format(said(PROBES[0]), said(PROBES[1]), both if several else "")
    checks: list[tuple[str, Sequence[ToolCall]]] = [(said(call), [call]) for call in CHECKS]
    if several:
        checks.append((said(*PROBES), PROBES))
    if form is not None and not gives_back(form, checks):
        form = None
    beside = "Zc7" in answer(PROBES[0], text="Zc7")
    example = said({"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}})
    escapes = facts.escapes or "\\u00e9" in said(CHECKS[0])
    return replace(
        facts, beside=beside, several=several, form=form, end=end, example=example, escapes=escapes
    )


def _end(one: str, follows: str, behind: str, special: Sequence[str]) -> str:
    """The special token that ends a call: behind it, or, where turns have no end, the one that begins the next turn."""
    if not behind.strip():
        return next((token for token in special if follows.lstrip().startswith(token)), "")
    return next((token for token in special if one.rstrip().endswith(token)), "")


# -- messages as a template takes them ---------------------------------------------------------------------


def as_functions(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools as templates take them, each with a name, a description and parameters."""
    blank = {"name": "", "description": "", "parameters": {"type": "object", "properties": {}}}
    return [{"type": "function", "function": {**blank, **function_of(tool)}} for tool in tools]


def with_ids(messages: Sequence[Message], *, short: bool) -> list[Message]:
    """Each call with an id, each result with that of its call and the name of its tool.

    Where a result says no id, it answers the first call of its name that is still open, or else the first. An id that
    is missing comes from what is called, so that it is the same whatever stands in front.

    Args:
        short: ids have nine letters and digits; others are replaced.
    """
    found: list[Message] = []
    pending: list[tuple[str | None, str, str]] = []  # the id in the data, the id here, the name
    for message in messages:
        message = {**message}
        if message.get("tool_calls"):
            calls: list[ToolCall] = []
            for number, call in enumerate(message["tool_calls"]):
                own = call.get("id")
                usable = own is not None and (not short or re.fullmatch(r"[A-Za-z0-9]{9}", own))
                given = (
                    own
                    if own is not None and usable
                    else _new_id(own or f"{number} {call['name']} {_json(call['arguments'])}")
                )
                pending.append((own, given, call["name"]))
                calls.append({"name": call["name"], "arguments": call["arguments"], "id": given})
            message["tool_calls"] = calls
        elif message["role"] == "tool" and pending:
            own, name = message.get("tool_call_id"), message.get("name")
            answers = next((one for one in pending if own is not None and one[0] == own), None)
            answers = answers or next((one for one in pending if one[2] == name), pending[0])
            pending.remove(answers)
            message["tool_call_id"] = answers[1]
            message["name"] = message.get("name") or answers[2]
        found.append(message)
    return found


def _new_id(said: str) -> str:
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def native_turns(facts: ToolFacts, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Calls and results in the way that the template takes."""
    found: list[dict[str, Any]] = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls and facts.way == "metadata":
            if message["content"]:
                found.append({"role": "assistant", "content": message["content"]})
            found += [
                {"role": "assistant", "metadata": call["name"], "content": _json(call["arguments"])}
                for call in calls
            ]
        elif calls:
            turn: dict[str, Any] = {**message, "tool_calls": [_wrapped(call, facts) for call in calls]}
            turn["content"] = message["content"] or facts.content
            found.append(turn)
        elif message["role"] == "tool" and facts.way == "metadata":
            found.append({**message, "role": "observation"})
        else:
            found.append({key: value for key, value in message.items() if key != "tool_calls"})
    return found


def _wrapped(call: ToolCall, facts: ToolFacts) -> dict[str, Any]:
    arguments = _json(call["arguments"]) if facts.way == "text" else call["arguments"]
    return {
        "id": call.get("id", ""),
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- the plain form ----------------------------------------------------------------------------------------


def plain_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Calls as lines of the assistant's text, results between marks in a user's turn, so that turns still alternate."""
    found: list[dict[str, Any]] = []
    before = ""  # the role of the message before
    for message in messages:
        turn: dict[str, Any] = {
            key: message[key] for key in ("role", "content", "reasoning") if key in message
        }
        if message.get("tool_calls"):
            lines = [*([turn["content"]] if turn["content"] else []), *map(plain_call, message["tool_calls"])]
            turn["content"] = "\n".join(lines)
        elif message["role"] == "tool":
            turn = {"role": "user", "content": f"{_RESULT[0]}\n{message['content']}\n{_RESULT[1]}"}
        joins = turn["role"] == "user" and bool(found) and found[-1]["role"] == "user"
        if joins and "tool" in (message["role"], before):
            found[-1]["content"] += "\n" + turn["content"]
        else:
            found.append(turn)
        before = message["role"]
    return found


def with_plain_list(
    messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]], example: str
) -> list[dict[str, Any]]:
    """The tools behind the system message, or as one.

    Args:
        example: a call as the model is to write it; "" for the plain form.
    """
    example = example or f'{PLAIN.open}{{"name": NAME, "arguments": {{"ARGUMENT": VALUE}}}}{PLAIN.close}'
    listed = "\n".join(_json(function_of(tool)) for tool in tools)
    text = (
        "# Tools\n\nThese functions can be called to answer the question:\n"
        f"<tools>\n{listed}\n</tools>\n\nTo call one, answer with its name and its arguments, like this:\n{example}"
    )
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
