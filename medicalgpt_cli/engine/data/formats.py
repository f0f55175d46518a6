"""Files to conversations, prompts and documents: what is learnt from each record, and what is done about odd ones.

A record that contradicts its format ends the run with its file and line, once all are read: it is a mistake to be
mended. A record from which there is nothing to learn is skipped, counted and shown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.messages import Conversation, Document, Message
from medicalgpt_cli.engine.data.naming import keys_found
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.engine.data.readers import (
    HubDataset,
    Row,
    expand_sources,
    is_document,
    is_text,
    read_rows,
    unit_of,
)
from medicalgpt_cli.engine.data.records import EXPECTED, Record, kind_of_record, read_record
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError

_Made = TypeVar("_Made")
NO_RECORDS = "a document has no questions and answers"


def read_all(
    sources: Sequence[str],
    counts: Counts,
    observer: Observer,
    make: Callable[[Row], Iterable[_Made]],
    *,
    most: int | None = None,
    text_unit: str = "line",
    with_documents: bool = False,
    shares: Mapping[str, int] | None = None,
) -> Iterator[_Made]:
    """What `make` gives for each row. Rows that are wrong are kept until all are read, so that all can be named.

    Args:
        most: no more rows are read once so many things were made.
        text_unit, with_documents: as for `rows_of`.
        shares: how many things are made of each file, by the name of its rows; the rest of it is not read.

    Raises:
        DataError: rows were wrong.
    """
    made = 0
    made_of: Counter[str] = Counter()

    def has_enough(path: str) -> bool:
        return shares is not None and made_of[path] >= shares.get(path, 0)

    for row in rows_of(
        sources, counts, observer, text_unit=text_unit, with_documents=with_documents, has_enough=has_enough
    ):
        if most is not None and made >= most:
            break
        counts.read += 1
        try:
            found = list(make(row))
        except DataError as problem:
            counts.add_wrong(problem)
            continue
        if counts.keep_going or not counts.wrong:
            made += len(found)
            made_of[row.path] += len(found)
            yield from found
    counts.finish()


def iterate_conversations(
    sources: Sequence[str],
    counts: Counts,
    observer: Observer,
    *,
    most: int | None = None,
    shares: Mapping[str, int] | None = None,
) -> Iterator[Conversation]:
    """Conversations with at least one answer, of all sources in order; what is left out is counted.

    Raises:
        DataError: a row contradicts its format.
    """

    def make(row: Row) -> list[Conversation]:
        record = read_record(row, counts)
        return [] if record is None else to_conversations(record, row, counts)

    return read_all(sources, counts, observer, make, most=most, shares=shares)


def load_conversations(
    sources: Sequence[str], counts: Counts, observer: Observer, *, max_samples: int | None = None
) -> list[Conversation]:
    """All conversations of `iterate_conversations` at once.

    Raises:
        DataError: a row contradicts its format, or nothing is left.
    """
    found = list(iterate_conversations(sources, counts, observer, most=max_samples))
    if not found:
        raise DataError(f"{', '.join(sources)}: no conversation to learn from", why_nothing(counts))
    _warn_about_duplicates(found, counts)
    return found


def load_prompts(sources: Sequence[str], counts: Counts, observer: Observer) -> list[Conversation]:
    """What a model is to answer: each row up to its last user turn.

    Raises:
        DataError: a row contradicts its format, or nothing is left.
    """

    def make(row: Row) -> list[Conversation]:
        record = read_record(row, counts)
        return [] if record is None else to_prompts(record, counts)

    found = list(read_all(sources, counts, observer, make))
    if not found:
        raise DataError(f"{', '.join(sources)}: no prompt", why_nothing(counts))
    return found


def to_prompts(record: Record, counts: Counts) -> list[Conversation]:
    """A record up to its last user turn; none where it asks nothing.

    Raises:
        DataError: it is plain text.
    """
    _refuse_text(record)
    messages = up_to_question(record)
    if not messages:
        counts.add_skip("no question", record.at)
        return []
    for reason in not_asked(record, messages):
        counts.add_merge(reason, record.at)
    return [_conversation(record, messages)]


def up_to_question(record: Record) -> tuple[Message, ...]:
    """The messages of a record up to its last user turn, or the result of a tool behind that; empty without any."""
    messages = record.messages
    last = max((place for place, one in enumerate(messages) if one["role"] == "user"), default=None)
    if last is None or not messages[last]["content"].strip():
        return ()
    if messages[-1]["role"] == "tool":  # a call was made, and what it gave is to be answered
        return messages
    return messages[: last + 1]


def not_asked(record: Record, asked: Sequence[Message], *, uses_key: bool = False) -> list[str]:
    """What a record says that has no part in its question.

    Args:
        uses_key: whether the right options of an exam are made use of.
    """
    answered = len(record.messages) > len(asked) or bool(record.answers)
    said = {
        "what stands behind the last question is not shown to the model": (
            answered and not (uses_key and record.key)
        ),
        "other phrasings of the question are not asked": bool(record.variants),
        "whether its answer is marked as good or bad means nothing here": record.label is not None,
        "weights of answers mean nothing here": any("weight" in one for one in record.messages),
    }
    return [reason for reason, holds in said.items() if holds]


def iterate_texts(
    sources: Sequence[str], counts: Counts, observer: Observer, *, text_unit: str = "auto"
) -> Iterator[Document]:
    """Documents of text files and of `{"text": …}` records as a stream; empty ones are counted.

    Args:
        text_unit: what a document of a text file is: "line", "block" (between blank lines), "file", or
            "auto": blocks where the file has blank lines, else lines.

    Raises:
        DataError: a record has no text, or nothing is found.
    """
    any_found = False
    for row in rows_of(sources, counts, observer, text_unit=text_unit, with_documents=True):
        counts.read += 1
        try:
            must_be_text(kind_of_record(row.value, row.at), row.at)
            record = read_record(row, counts)
        except DataError as problem:
            counts.add_wrong(problem)
            continue
        if record is None:
            continue
        if record.text is None or not record.text.strip():
            counts.add_skip("no text", row.at)
        elif not counts.wrong:
            any_found = True
            yield Document(record.text, row.at)
    counts.finish()
    if not any_found:
        raise DataError(f"{', '.join(sources)}: no text", why_nothing(counts))


def must_be_text(kind: str, at: str) -> None:
    """
    Raises:
        DataError: a record is of another kind than text.
    """
    if kind != "text":
        raise DataError(
            f"this is {_article(kind)} record, and plain text is expected",
            '{"text": …}, or a .txt file; `medgpt sft` learns from conversations',
            at=at,
        )


def first_format(sources: Sequence[str], reading: ReadOptions = AS_FOUND) -> str:
    """The format of the first record that has one, which decides what the sources are for; text if all are documents.

    Raises:
        DataError: there is no record, or none of a known format.
    """
    files, _ = expand_sources(sources, with_documents=True)
    if files and all(is_document(file) for file in files):
        return "text"
    first: DataError | None = None
    for file in files:
        for row in () if is_document(file) else read_rows(file, reading=reading):
            try:
                return kind_of_record(row.value, row.at)
            except DataError as problem:
                first = first or problem
    raise first or DataError(f"{', '.join(sources)}: no record", "is it the right file?")


def to_conversations(record: Record, row: Row, counts: Counts) -> list[Conversation]:
    """The conversations of a record: one, or one for each phrasing of its question. None where nothing is to be learnt.

    Raises:
        DataError: the record is of a kind that has no answers.
    """
    _refuse_text(record)
    at = record.at
    if record.kind == "prompt" or (record.kind == "mcq" and record.messages[-1]["role"] == "user"):
        keys = keys_found(row.value, at)
        raise DataError(f"no answer to learn from; keys found: {keys}", f"expected: {EXPECTED}", at=at)
    messages = [*record.messages]
    if record.answers:
        messages.append({"role": "assistant", "content": record.answers[0]})
    if record.label is False:
        counts.add_skip(
            "its answer is marked as bad (label): no target of sft; kto learns from such answers", at
        )
        return []
    messages = join_same_role(messages, at, counts)
    while messages and messages[-1]["role"] != "assistant":
        if any(one["role"] == "assistant" for one in messages):
            counts.add_merge("turns behind the last answer left out", at)
        messages = messages[:-1]
    if reason := _nothing_to_learn(messages):
        counts.add_skip(reason, at)
        return []
    first = _conversation(record, tuple(messages))
    others = [replace(first, messages=_rephrased(first.messages, text)) for text in record.variants]
    if others:
        counts.add_merge("one conversation for each phrasing of the question", at)
        group = first.group or at  # their common answer stands on one side of a split
        return [replace(one, group=group) for one in (first, *others)]
    return [first]


def _nothing_to_learn(messages: Sequence[Message]) -> str | None:
    """Why a conversation has no answer that could be learnt; None where it has."""
    if not messages:
        return "no answer to learn from"
    if not any(one["role"] == "user" for one in messages):
        return "no question in front of the answer"
    answers = [one for one in messages if one["role"] == "assistant"]
    if any(not one["content"].strip() and not one.get("tool_calls") for one in answers):
        return "an empty answer"
    if any(one["role"] == "user" and not one["content"].strip() for one in messages):
        return "an empty question"
    if all(one.get("weight") == 0 for one in answers):
        return "all its answers have weight 0"
    return None


def _rephrased(messages: Sequence[Message], question: str) -> tuple[Message, ...]:
    """The messages with another last question; what was said before it stays."""
    last = max(place for place, one in enumerate(messages) if one["role"] == "user")
    return (*messages[:last], {**messages[last], "content": question}, *messages[last + 1 :])


def _conversation(record: Record, messages: tuple[Message, ...]) -> Conversation:
    return Conversation(messages, record.at, record.id, record.source, record.tools, record.group)


def _refuse_text(record: Record) -> None:
    if record.kind == "text":
        raise DataError(
            "plain text has no questions and answers",
            "plain text is for pretraining; here conversations",
            at=record.at,
        )


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def join_same_role(messages: Iterable[Message], at: str, counts: Counts) -> list[Message]:
    """Two user turns in a row are one; so are two answers, with their calls. Results of tools stay apart.

    Answers that are learnt with different weights stay apart, too.
    """
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        same = last is not None and last["role"] == message["role"] != "tool"
        if not same or last.get("weight", 1) != message.get("weight", 1):
            joined.append({**message})
            continue
        counts.add_merge(f"two {message['role']} turns in a row joined", at)
        texts = [one["content"] for one in (last, message)]
        both: Message = {
            **last,
            "content": "\n".join(texts if message["role"] == "user" else filter(None, texts)),
        }
        if calls := [*last.get("tool_calls", []), *message.get("tool_calls", [])]:
            both["tool_calls"] = calls
        if reasoning := [one["reasoning"] for one in (last, message) if "reasoning" in one]:
            both["reasoning"] = "\n\n".join(reasoning)
        joined[-1] = both
    return joined


def rows_of(
    sources: Sequence[str],
    counts: Counts,
    observer: Observer,
    *,
    text_unit: str = "line",
    has_enough: Callable[[str], bool] = lambda path: False,
    with_documents: bool = False,
) -> Iterator[Row]:
    """The rows of all sources in order.

    Args:
        has_enough: whether no more rows of a file are wanted, by the name of its rows.
        with_documents: whether documents (`.docx`, …) are read; where not, those of a folder are left out and counted.

    Raises:
        DataError: what is wrong with a file, or a document is named where it is of no use.
    """
    files, ignored = expand_sources(sources, counts.notices, with_documents=with_documents)
    if ignored:
        word = "of unknown kind" if with_documents else "that hold no records"
        counts.notices.append(
            f"{len(ignored)} files {word} in the folders are left out, such as {ignored[0]}"
        )
    for file in files:
        if is_document(file) and not with_documents:
            raise DataError(NO_RECORDS, "its text is for pretrain and vocabulary", at=str(file))
        task = f"reading {getattr(file, 'name', file)}"
        observer.on_task_start(task, None, "rows")
        number = 0
        try:
            for number, row in enumerate(_rows_of_file(file, counts, text_unit), 1):
                if has_enough(row.path):
                    break
                if number % 1000 == 0:
                    observer.on_task_advance(task, number)
                yield row
        except DataError as problem:
            if not counts.keep_going:
                raise
            counts.add_wrong_line(problem)
            if number:
                counts.notices.append(f"{file}: what stands behind row {number:,} cannot be read")
        observer.on_task_end(task)


def _rows_of_file(file: Path | HubDataset, counts: Counts, text_unit: str) -> Iterator[Row]:
    unit = "line"
    if is_text(file):
        unit = unit_of(file, counts.reading) if text_unit == "auto" else text_unit
        counts.formats[str(file)] = f"text, a document a {unit}"
    wrong = counts.add_wrong_line if counts.keep_going else None
    any_found, before = False, counts.wrong_total
    for row in read_rows(file, text_unit=unit, notices=counts.notices, reading=counts.reading, wrong=wrong):
        any_found = True
        yield row
    if not any_found and counts.wrong_total == before:
        raise DataError(f"{getattr(file, 'name', file)}: the file holds no record", "is it the right file?")


def _warn_about_duplicates(found: Sequence[Conversation], counts: Counts) -> None:
    distinct = len({json.dumps(c.messages, sort_keys=True) for c in found})
    if distinct < len(found):
        counts.notices.append(f"{len(found) - distinct} of {len(found)} conversations repeat another one")


def why_nothing(counts: Counts) -> str:
    """Why there is nothing, for a hint."""
    if counts.skipped:
        return "; ".join(f"{number} skipped: {reason}" for reason, number in counts.skipped.most_common(3))
    return "the files are empty"
