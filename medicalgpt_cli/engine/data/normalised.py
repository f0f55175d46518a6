"""Records in one documented schema (docs/data-formats.md), which the readers take back as what they were."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.exams import Exam
from medicalgpt_cli.engine.data.messages import Message, ToolCall
from medicalgpt_cli.engine.data.readers import Row, parse_json
from medicalgpt_cli.engine.data.reasoning import CLOSE, OPEN, split_reasoning
from medicalgpt_cli.engine.data.records import Record, read_record
from medicalgpt_cli.errors import DataError

_ODD = re.compile("[\u0085\u2028\u2029\ud800-\udfff]")


def normalised(record: Record, margin: float | None = None) -> dict[str, Any]:
    """A record as an object of the schema.

    Raises:
        DataError: it cannot be written so that it is read as the same again.
    """
    value = _written(record)
    if record.label is not None:
        value["label"] = record.label
    if margin is not None:
        value["margin"] = margin
    if record.tools:
        value["tools"] = [{"type": "function", "function": tool} for tool in record.tools]
    if record.id is not None:
        value["id"] = record.id
    if record.group is not None:
        value["group"] = record.group
    if not _reads_back(value, record):
        raise DataError(
            "this record cannot be written so that it is read as the same again",
            "is its reasoning marked twice, or are its weights out of range?",
            at=record.at,
        )
    return value


def line_of(value: dict[str, Any]) -> str:
    """An object as a JSON line, of characters that can be written and that no program takes for a line end.

    Raises:
        ValueError, TypeError: JSON has no such value (of a table: a date, or not a number).
    """
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if _ODD.search(line):
        return json.dumps(value, allow_nan=False)
    return line


def _written(record: Record) -> dict[str, Any]:
    if record.kind == "text":
        return {"text": record.text}
    if record.kind == "mcq":
        return _exam(record)
    if record.variants:
        return _phrasings(record)
    messages = [turn_of(one) for one in record.messages]
    if record.kind == "preference":
        return {"prompt": messages, "chosen": record.answers[0], "rejected": record.answers[1]}
    if record.kind == "ranking":
        places = sorted(set(record.ranks))
        return {
            "prompt": messages,
            "responses": list(record.answers),
            "ranks": [places.index(rank) + 1 for rank in record.ranks],
        }
    return {"messages": messages}


def _exam(record: Record) -> dict[str, Any]:
    """A question with options: they stand apart from the question, and the right ones are letters."""
    before, question, answer = _around_the_question(record)
    exam = Exam(record.options or {}, record.key, False)
    value = before | {
        "question": question.removesuffix(exam.question("")).removesuffix("\n"),
        "options": exam.options,
    }
    if record.key:
        value["answer"] = list(record.key)
    if answer and not (record.key and answer["content"] == exam.answer()):
        value["output"] = _content(answer)
    return value | _of_the_answer(answer)


def _phrasings(record: Record) -> dict[str, Any]:
    """Several questions with one answer."""
    before, question, answer = _around_the_question(record)
    value = before | {"questions": [question, *record.variants]}
    return value | {"answers": [_content(answer)] if answer else []} | _of_the_answer(answer)


def _around_the_question(record: Record) -> tuple[dict[str, Any], str, Message | None]:
    """({"system", "history"} where there are any, the last question, the answer behind it)."""
    messages = list(record.messages)
    answer = messages.pop() if messages[-1]["role"] == "assistant" else None
    question = messages.pop()["content"]
    before: dict[str, Any] = {}
    if messages and messages[0]["role"] == "system" and messages[0]["content"].strip():
        before["system"] = messages.pop(0)["content"]
    if messages:
        weight = answer.get("weight", 1) if answer else 1  # of the record, by which these were multiplied
        before["history"] = [turn_of(_without_weight(one, weight)) for one in messages]
    return before, question, answer


def _without_weight(message: Message, weight: float) -> Message:
    found: Message = {**message}
    if "weight" in found:
        own = found.pop("weight")
        if weight and own != weight:
            found["weight"] = own / weight
    return found


def _of_the_answer(answer: Message | None) -> dict[str, Any]:
    """What a record says about its answer beside the text."""
    value: dict[str, Any] = {}
    if answer and "reasoning" in answer and not _stays_inline(answer):
        value["reasoning_content"] = answer["reasoning"]
    if answer and "weight" in answer:
        value["weight"] = answer["weight"]
    return value


def turn_of(message: Message) -> dict[str, Any]:
    """A message as a turn of `messages`, which is read back as this message."""
    value: dict[str, Any] = {"role": message["role"], "content": _content(message)}
    if "reasoning" in message and not _stays_inline(message):
        value["reasoning_content"] = message["reasoning"]
    if "tool_calls" in message:
        value["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    value |= {key: message[key] for key in ("name", "tool_call_id", "weight") if key in message}
    return value


def _call(call: ToolCall) -> dict[str, Any]:
    identifier = {"id": call["id"]} if "id" in call else {}
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {**identifier, "type": "function", "function": function}


def _content(message: Message) -> str:
    """The text of a turn; with its reasoning in front of it where it could be taken for reasoning itself."""
    if _stays_inline(message):
        return f"{OPEN}{message.get('reasoning', '')}{CLOSE}{message['content']}"
    return message["content"]


def _stays_inline(message: Message) -> bool:
    content = message["content"]
    return message["role"] == "assistant" and split_reasoning(content) != (None, content)


def _reads_back(value: dict[str, Any], record: Record) -> bool:
    """Whether the line of an object is read as this record, whatever key said what of it before."""
    counts = Counts(group=None if record.group is None else "group")
    try:
        row = Row(record.source, 0, parse_json(line_of(value)))
        back = read_record(row, counts, used=("margin",))
    except (DataError, ValueError, TypeError):
        return False
    return back is not None and not counts.unused() and _said(back) == _said(record)


def _said(record: Record) -> Record:
    """A record without where it stands and how it was spelt."""
    kind = record.kind if record.kind in ("text", "preference", "ranking", "mcq") else "conversation"
    places: Sequence[float] = sorted(set(record.ranks))
    ranks = tuple(float(places.index(rank)) for rank in record.ranks)
    return replace(record, kind=kind, at="", source="", ranks=ranks)
