"""What a policy is to answer: prompts of any kind of file, and the key of a question that has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medicalgpt_cli.engine.data.formats import Counts, Message, messages_of, rows_of
from medicalgpt_cli.engine.data.preferences import prompt_hash
from medicalgpt_cli.engine.data.readers import AS_FOUND, ReadOptions, Row
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

    @property
    def hash(self) -> str:
        return prompt_hash(self.messages)


def load_rl_prompts(
    sources: Sequence[str], counts: Counts, observer: Observer, *, reading: ReadOptions = AS_FOUND
) -> list[Prompt]:
    """Each row up to its last user turn; a repeated prompt is counted and used once.

    Raises:
        DataError: a row contradicts its format, or nothing is left.
    """
    found: dict[str, Prompt] = {}
    for row in rows_of(sources, counts, observer, reading=reading):
        counts.read += 1
        messages, identifier = messages_of(row, counts)
        last = max((index for index, one in enumerate(messages) if one["role"] == "user"), default=None)
        if last is None or not messages[last]["content"].strip():
            counts.add_skip("no question", row.at)
            continue
        options, key = _key_of(row)
        prompt = Prompt(tuple(messages[: last + 1]), row.at, row.path, identifier, options, key)
        if prompt.hash in found:
            counts.add_skip("the prompt stood there before", row.at)
            continue
        found[prompt.hash] = prompt
    if not found:
        raise DataError(f"{', '.join(sources)}: no prompt", "is it the right file?")
    return list(found.values())


def _key_of(row: Row) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """Options and right letters of a multiple-choice question; nothing for others.

    Raises:
        DataError: the answer is not among the options.
    """
    value: Any = row.value
    if not isinstance(value, dict) or not isinstance(value.get("options"), dict):
        return None, ()
    answer = value.get("answer")
    letters = [answer] if isinstance(answer, str) else answer
    known = isinstance(letters, list) and all(isinstance(one, str) for one in letters)
    if not known or not letters or any(one not in value["options"] for one in letters):
        raise DataError(
            "the answer is not among the options", "expected the letter, or a list of letters", at=row.at
        )
    return dict(value["options"]), tuple(sorted(letters))
