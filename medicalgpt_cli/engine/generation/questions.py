"""The questions of `medgpt infer`: text, a question a line, or JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data.formats import Counts, Message, messages_of
from medicalgpt_cli.engine.data.readers import Row, read_rows
from medicalgpt_cli.errors import DataError


@dataclass(frozen=True)
class Question:
    id: str
    input: Any  # as the file has it: text, or a list of messages
    messages: tuple[Message, ...]
    at: str


def read_questions(source: str) -> list[Question]:
    """All questions of a file, or of standard input for `-`.

    Raises:
        DataError: a line is no question, two rows share an id, or there is none at all.
    """
    found, seen = [], {}
    rows = _standard_input() if source == "-" else read_rows(_existing(source))
    for row in rows:
        question = _question(row, len(found) + 1)
        if question.id in seen:
            raise DataError(
                f"the id {question.id!r} stands twice (first at {seen[question.id]})",
                "ids have to differ",
                at=row.at,
            )
        seen[question.id] = row.at
        found.append(question)
    if not found:
        raise DataError(f"{source}: there is no question in it", "one question a line, or JSON lines")
    return found


def _question(row: Row, number: int) -> Question:
    if isinstance(row.value, str):
        return Question(str(number), row.value, ({"role": "user", "content": row.value},), row.at)
    messages, identifier = messages_of(row, Counts())
    last = max((i for i, one in enumerate(messages) if one["role"] == "user"), default=None)
    if last is None:
        raise DataError(
            "no question", 'expected "prompt", "question", "instruction" or "messages"', at=row.at
        )
    asked = tuple(messages[: last + 1])
    alone = len(asked) == 1
    return Question(identifier or str(number), asked[0]["content"] if alone else list(asked), asked, row.at)


def _existing(source: str) -> Path:
    path = Path(source)
    if not path.is_file():
        raise DataError(f"--data-file {source}: no such file", "check the path, or - for standard input")
    return path


def _standard_input() -> Iterator[Row]:
    """JSON lines if the first line is an object, else a question a line."""
    as_json = None
    for number, raw in enumerate(sys.stdin.buffer, 1):
        at = f"<stdin>:{number}"
        try:
            text = raw.decode("utf-8-sig").strip("\r\n")
        except UnicodeDecodeError:
            raise DataError("not UTF-8", "convert the text first", at=at) from None
        if not text.strip():
            continue
        if as_json is None:
            as_json = text.lstrip().startswith("{")
        if not as_json:
            yield Row("<stdin>", number, text)
            continue
        try:
            yield Row("<stdin>", number, json.loads(text))
        except (json.JSONDecodeError, RecursionError):
            raise DataError("not valid JSON", "one object a line", at=at) from None
