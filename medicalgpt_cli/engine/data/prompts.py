"""What a policy is to answer: prompts of any kind of file, and the key of a question that has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.formats import not_asked, read_all, up_to_question
from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.preferences import prompt_hash
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import read_record
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError


@dataclass(frozen=True)
class Prompt:
    messages: tuple[Message, ...]  # the last is the user's
    at: str
    source: str
    id: str | None = None
    options: dict[str, str] | None = None  # letter to text, of a question with options
    key: tuple[str, ...] = ()  # the letters of the right options
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None

    @property
    def hash(self) -> str:
        return prompt_hash(self.messages)


def load_rl_prompts(sources: Sequence[str], counts: Counts, observer: Observer) -> list[Prompt]:
    """Each row up to its last user turn; a repeated prompt is counted and used once.

    Raises:
        DataError: a row contradicts its format, or nothing is left.
    """
    found: dict[str, Prompt] = {}

    def make(row: Row) -> list[Prompt]:
        record = read_record(row, counts)
        if record is None:
            return []
        if record.kind == "text":
            raise DataError("plain text is no question", "plain text is for pretraining", at=row.at)
        messages = up_to_question(record)
        if not messages:
            counts.add_skip("no question", row.at)
            return []
        for reason in not_asked(record, messages, uses_key=True):
            counts.add_merge(reason, row.at)
        return [
            Prompt(
                messages, row.at, row.path, record.id, record.options, record.key, record.tools, record.group
            )
        ]

    for prompt in read_all(sources, counts, observer, make):
        if prompt.hash in found:
            counts.add_skip("the prompt stood there before", prompt.at)
        else:
            found[prompt.hash] = prompt
    if not found:
        raise DataError(f"{', '.join(sources)}: no prompt", "is it the right file?")
    return list(found.values())
