"""What a model writes, read as it grows: its reasoning, the text of its answer, and its calls of tools."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.messages import ToolCall
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.engine.data.rendering import answer_header
from medicalgpt_cli.engine.data.template_facts import template_facts
from medicalgpt_cli.engine.data.tools import AnswerStream, Delta, decode_answer


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids, and what the answer to it is read by.

    tools: those that were offered; only a call of one of them is a call. raw: text that is continued, in whose
    continuation no mark means anything.
    """

    ids: list[int]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: Thinking = "auto"
    raw: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def content_of(deltas: Iterable[Delta]) -> str:
    """What deltas add to the text of the answer."""
    return "".join(one.text for one in deltas if one.kind == "content")


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with neighbours of one kind put together."""
    found: list[Delta] = []
    for delta in deltas:
        if found and found[-1].kind == delta.kind != "tool_call":
            found[-1] = Delta(delta.kind, found[-1].text + delta.text)
        else:
            found.append(delta)
    return found


class AnswerReader:
    """Reads one answer. What it has found only grows; a stop text ends the answer where it stands in its text.

    Args:
        stops: looked for in the text of the answer, not in its reasoning or calls.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: EncodedPrompt, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.content, self.reasoning = "", ""
        self.tool_calls: list[ToolCall] = []
        self.stopped = False
        self._stream = (
            None if prompt.raw else AnswerStream(tokenizer, tools=prompt.tools, thinking=prompt.thinking)
        )
        facts = template_facts(tokenizer)
        # A channel that the template itself never renders is passed over; others are the stream's.
        self._has_channels = not prompt.raw and facts.header.first is not None and facts.reasoning.way is None
        self._begins: int | None = None if self._has_channels else 0
        self._length = 0  # characters that were read
        self._given = 0  # characters of the content that were given out
        self._deltas: list[Delta] = []
        self._over = False

    @property
    def malformed(self) -> bool:
        """Whether something looks like a call and is none; it stands in the content."""
        return self._stream is not None and self._stream.malformed

    def read(self, ids: Sequence[int], *, complete: bool = False) -> None:
        """Read on.

        Args:
            ids: all tokens of the answer so far. complete: nothing follows.
        """
        if self.stopped or self._over:
            return
        self._over = complete
        text = self._text(ids, complete).rstrip("\ufffd")  # a character cut in half
        piece, self._length = text[self._length :], max(self._length, len(text))
        if self._stream is None:
            self._take([Delta("content", piece)])
            return
        self._take(self._stream.feed(piece))
        if complete and not self.stopped:
            self._take(self._stream.finish())
        elif not self.stopped and self._stops(self.content + self._stream.space):
            self.content, self.stopped = cut_at(self.content + self._stream.space, self.stops), True

    def take(self) -> list[Delta]:
        """What is new and certain since the last time."""
        safe = self.content if self._over or self.stopped else certain(self.content, self.stops)
        self._give(len(safe))
        found, self._deltas = self._deltas, []
        return found

    def _take(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            if delta.kind == "content":
                self.content += delta.text
                if self._stops(self.content):
                    self.content, self.stopped = cut_at(self.content, self.stops), True
                    return
                continue
            self._give(len(self.content))
            self._deltas.append(delta)
            if delta.call is not None:
                self.tool_calls.append(delta.call)
            self.reasoning += delta.text

    def _give(self, length: int) -> None:
        if length > self._given:
            self._deltas.append(Delta("content", self.content[self._given : length]))
            self._given = length

    def _stops(self, text: str) -> bool:
        return any(stop in text for stop in self.stops)

    def _text(self, ids: Sequence[int], complete: bool) -> str:
        if self._begins is None:
            self._begins = self._behind_channels(ids, complete)
        if self._begins is None:
            return ""
        if self._stream is None:
            return _spelled(self.tokenizer, ids, special=False)
        text = decode_answer(self.tokenizer, ids[self._begins :])
        return text.lstrip() if self._begins and answer_header(self.tokenizer).ends_in_space else text

    def _behind_channels(self, ids: Sequence[int], complete: bool) -> int | None:
        """How many tokens stand in front of the answer; None while that is open, or where there is none."""
        header = answer_header(self.tokenizer)
        whole = _spelled(self.tokenizer, ids, special=True).lstrip()
        if list(ids[:1]) != [header.first]:
            is_open = not complete and header.text.startswith(whole.rstrip("\ufffd").rstrip())
            return None if is_open else 0
        if header.text not in whole:
            return None
        return 1 + bisect.bisect_left(
            range(len(ids)),
            True,
            key=lambda last: header.text in _spelled(self.tokenizer, ids[: last + 1], special=True),
        )


def is_in_template(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether token ids end as the prompt for an answer does, where the template has a header for answers."""
    header = answer_header(tokenizer)
    return not header.text or list(ids[len(ids) - len(header.generation) :]) == list(header.generation)


def _spelled(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


def certain(text: str, stops: Sequence[str]) -> str:
    """What of an unfinished text is certain to be no beginning of a stop text."""
    beginnings = (stop[:length] for stop in stops for length in range(1, len(stop)))
    uncertain = max((len(one) for one in beginnings if text.endswith(one)), default=0)
    return text[: len(text) - uncertain]
