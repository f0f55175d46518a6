"""The questions of `medgpt infer`: text, a question a line, or JSON lines."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.encodings import stream_as_utf8
from medicalgpt_cli.engine.data.formats import NO_RECORDS, not_asked, up_to_question
from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.readers import (
    Row,
    is_document,
    must_be_a_file,
    parse_json,
    read_rows,
    renamed,
    text_lines,
)
from medicalgpt_cli.engine.data.reading import counts_for
from medicalgpt_cli.engine.data.records import read_record
from medicalgpt_cli.engine.generation.wire import to_wire
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.settings.stages import InferSettings


@dataclass(frozen=True)
class Question:
    id: str
    input: Any  # text, or a list of messages in OpenAI's shape
    messages: tuple[Message, ...]
    at: str
    tools: tuple[dict[str, Any], ...] = ()


def read_questions(source: str, counts: Counts | None = None) -> list[Question]:
    """All questions of a file, or of standard input for `-`.

    Args:
        counts: takes the keys that nothing was made of, and what else is worth knowing.

    Raises:
        DataError: a line is no question, two rows share an id, or there is none at all.
    """
    counts = counts or Counts()
    found, seen = [], {}
    for row in _rows(source, counts):
        counts.read += 1
        try:
            question = _question(row, len(found) + counts.wrong_total + 1, counts)
        except DataError as problem:
            counts.add_wrong(problem)
            continue
        if question.id in seen:
            raise DataError(
                f"its id is that of an earlier record ({seen[question.id]})",
                "ids have to differ",
                at=row.at,
            )
        seen[question.id] = row.at
        found.append(question)
    counts.finish()
    if not found:
        raise DataError(f"{source}: there is no question in it", "one question a line, or JSON lines")
    return found


def _question(row: Row, number: int, counts: Counts) -> Question:
    if isinstance(row.value, str):
        return Question(str(number), row.value, ({"role": "user", "content": row.value},), row.at)
    skipped = counts.skipped.copy()
    record = read_record(row, counts)
    if record is None:  # an answer is expected for each row
        reason = next(iter(counts.skipped - skipped))
        raise DataError(
            f"this cannot be asked: {reason}", "take the record out, or ask without it", at=row.at
        )
    asked = up_to_question(record)
    if not asked:
        raise DataError(
            "no question", 'expected "prompt", "question", "instruction" or "messages"', at=row.at
        )
    alone = len(asked) == 1
    shown = asked[0]["content"] if alone else [to_wire(one) for one in asked]
    for reason in not_asked(record, asked):
        counts.add_merge(reason, row.at)
    return Question(record.id or str(number), shown, asked, row.at, record.tools)


def counts_of_questions(settings: InferSettings) -> Counts:
    """Empty counts for `read_questions`, with the reading options of a command."""
    source = settings.data_file or "-"
    named = (
        [] if is_stream(source) or not Path(source).is_file() else [source]
    )  # what is missing is said later
    return counts_for(settings, named)


def is_stream(source: str) -> bool:
    """Whether questions come as a stream, or from a file whose name has no ending to say what it is."""
    return source == "-" or not Path(source).suffix


def _rows(source: str, counts: Counts) -> Iterator[Row]:
    path = Path(source)
    if source == "-":
        yield from _rows_of_stream(sys.stdin.buffer, "<stdin>", counts)
    elif not path.exists() or path.is_dir():
        raise DataError(f"--data-file {source}: no such file", "check the path, or - for standard input")
    elif is_document(path):
        raise DataError(NO_RECORDS, "write the questions as text, one a line, or as a table", at=source)
    elif not is_stream(source):
        yield from read_rows(path, notices=counts.notices, reading=counts.reading)
    else:  # as with a pipe of the shell: <(command)
        if not source.startswith(("/dev/fd/", "/proc/self/fd/", "/dev/stdin")):
            must_be_a_file(path)
        with path.open("rb") as file:
            yield from _rows_of_stream(file, source, counts)


def _rows_of_stream(file: IO[bytes], name: str, counts: Counts) -> Iterator[Row]:
    """The rows with the keys of `--columns`.

    Raises:
        DataError: a column stands in no row; of a stream that is known at its end only.
    """
    columns = counts.reading.columns
    missing = {column for _, column in columns}
    for row in _parsed_stream(file, name, counts):
        if isinstance(row.value, dict):
            missing -= row.value.keys()
        yield renamed(row, columns) if columns else row
    if missing:
        raise DataError(f"--columns: no record has a {min(missing)}", "check its spelling", at=name)


def _parsed_stream(file: IO[bytes], name: str, counts: Counts) -> Iterator[Row]:
    """An array of objects, JSON lines if the first line is an object, else a question a line."""
    utf8 = stream_as_utf8(file, name, counts.reading, counts.notices)
    lines = ((number, text) for number, text in text_lines(utf8, name) if text.strip())
    first = next(lines, None)
    if first is None:
        return
    lines = itertools.chain([first], lines)
    start = first[1].lstrip()[0]
    if start == "[":  # an array, or a question that begins with a bracket
        kept = list(lines)
        array = _array("\n".join(text for _, text in kept))
        if array is not None:
            yield from (Row(name, number, value) for number, value in enumerate(array, 1))
            return
        lines = iter(kept)
    for number, text in lines:
        yield Row(name, number, _object(f"{name}:{number}", text) if start == "{" else text)


def _array(text: str) -> list[Any] | None:
    try:
        value = parse_json(text)
    except DataError:
        return None
    return value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else None


def _object(at: str, text: str) -> Any:
    try:
        return parse_json(text)
    except DataError as problem:
        raise DataError(problem.message, problem.hint, at=at) from None
