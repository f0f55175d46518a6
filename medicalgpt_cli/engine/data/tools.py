"""What a model wrote, taken apart: its reasoning, its answer, and its calls of tools; at once or piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.calls import (
    CallReader,
    NeedMore,
    NotACall,
    after_literal,
    after_space,
)
from medicalgpt_cli.engine.data.control_tokens import encode_piece
from medicalgpt_cli.engine.data.messages import ToolCall
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.engine.data.template_facts import template_facts


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer taken apart. What the model wrote that belongs to none of the marks stands in one of the parts."""

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: bool = (
        False  # something looks like a call and is none; it stands in `content` as it was written
    )


@dataclass(frozen=True)
class Delta:
    """What a piece of an answer adds: text of the answer, text of the reasoning, or a whole call."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    call: ToolCall | None = None


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer for `parse_answer`.

    The marks around reasoning and calls stay, also where these are special tokens, which an ordinary decoding
    (`skip_special_tokens=True`) leaves out. Other special tokens, such as the end of the turn, are left out.
    """
    facts = template_facts(tokenizer)
    known = getattr(tokenizer, "_medgpt_marks", None)
    if known is None or known[0] is not facts:
        marks = [facts.reasoning.open, facts.reasoning.close, facts.header.text]
        marks.append(facts.tools.form.marks if facts.tools.form else facts.tools.example)
        kept = {token for mark in marks for token in encode_piece(tokenizer, mark)}
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        known = tokenizer._medgpt_marks = (facts, special - kept)
    left = [token for token in ids if token not in known[1]]
    return str(tokenizer.decode(left, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def parse_answer(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: Thinking = "auto",
) -> ParsedAnswer:
    """Take apart what a model wrote behind the prompt of `encode_prompt` with the same `tools` and `thinking`.

    A call is what reads as one in the template's own form, and closes as it does; anything else stays text. Reasoning
    that is never closed is all reasoning: the answer was cut.

    Args:
        text: of `decode_answer`. tools: those that were offered; a call of another one is text, and with none offered
            nothing is a call. None: any name is one.
    """
    stream = AnswerStream(tokenizer, tools=tools, thinking=thinking)
    deltas = [*stream.feed(text), *stream.finish()]
    said = {
        kind: "".join(one.text for one in deltas if one.kind == kind) for kind in ("content", "reasoning")
    }
    calls = tuple(one.call for one in deltas if one.call is not None)
    return ParsedAnswer(said["content"], said["reasoning"] or None, calls, stream.malformed)


class AnswerStream:
    """The same piece by piece: the deltas joined are what `parse_answer` finds in the pieces joined.

    What could still become a mark, a call, or white space that belongs to one is held back until that is certain.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: Thinking = "auto",
    ) -> None:
        facts = template_facts(tokenizer)
        self._reasoning, self._header = facts.reasoning, facts.header
        form = None if tools is not None and not tools else facts.tools.form
        self._reader = CallReader(form, tools) if form else None
        self._text = ""  # what is not yet decided
        self._space = ""  # white space that is said only if text follows it
        self._said = False  # whether a text of the answer was given out
        self._calls = 0
        self._state = self._in_reasoning if thinking in self._reasoning.opened else self._at_start
        self._opened_by_prompt = thinking in self._reasoning.opened
        self._trim = True  # whether white space in front of what comes is dropped
        self.malformed = False

    @property
    def space(self) -> str:
        """White space of the answer that is held back: it is said if text follows, or nothing at all."""
        return self._space if self._state == self._in_content else ""

    def feed(self, piece: str) -> list[Delta]:
        """What is certain after one more piece."""
        self._text += piece
        return self._advance(final=False)

    def finish(self) -> list[Delta]:
        """What is left when nothing follows."""
        found = self._advance(final=True)
        if self._space and not self._calls and self._state == self._in_content:
            found.append(Delta("content", self._space))
        self._space = ""
        return found

    def _advance(self, *, final: bool) -> list[Delta]:
        found: list[Delta] = []
        try:
            while self._text and self._state(found, final):
                pass
        except NeedMore:
            pass
        return found

    # Each of these goes on by one step, and says whether it did.

    def _at_start(self, found: list[Delta], final: bool) -> bool:
        """Reasoning, the header of an answer, or the answer itself."""
        undecided = False
        marks = ((self._reasoning.open, self._in_reasoning), (self._header.text, self._in_content))
        for mark, state in marks:
            if not mark.strip():
                continue
            try:
                self._drop(after_literal(self._text, 0, mark, final))
            except NotACall:
                continue
            except NeedMore:
                undecided = True
                continue
            self._state = state
            return True
        if undecided:
            raise NeedMore
        self._state = self._in_content
        return True

    def _in_reasoning(self, found: list[Delta], final: bool) -> bool:
        if self._opened_by_prompt:  # some models open it again
            self._drop(_behind(self._text, self._reasoning.open, final))
            self._opened_by_prompt = False
        mark = self._reasoning.close.split()[0]
        at = self._text.find(mark)
        if at < 0:
            self._say("reasoning", len(self._text) if final else _certain(self._text, (mark,)), found)
            if final:
                self._space = ""
            return False
        try:
            end = after_literal(self._text, at, self._reasoning.close, final)
        except NotACall:
            self._say("reasoning", at + len(mark), found)
            return True
        self._say("reasoning", at, found)
        self._drop(end - at)
        self._space, self._trim = "", True
        self._state = self._behind_reasoning
        return True

    def _behind_reasoning(self, found: list[Delta], final: bool) -> bool:
        self._drop(_behind(self._text, self._header.text, final))
        self._state = self._in_content
        return True

    def _in_content(self, found: list[Delta], final: bool) -> bool:
        if self._reader is None:
            self._say("content", len(self._text), found)
            return False
        if self._reader.form.bare and not self._said and not self._calls:
            if self._bare(self._reader, found, final):
                return True
        elif self._calls and not self._reader.form.bare:
            place = self._reader.after_between(self._text, 0, final)
            self._drop(place)
        firsts = self._reader.firsts
        places = [place for place in (self._text.find(one) for one in firsts) if place >= 0]
        if not places:
            self._say("content", len(self._text) if final else _certain(self._text, firsts), found)
            return False
        at = min(places)
        self._say("content", at, found)
        try:
            calls, end = self._reader.read(self._text, 0, final)
        except NotACall as problem:
            self.malformed |= problem.looks
            length = next(
                len(one) for one in sorted(firsts, key=len, reverse=True) if self._text.startswith(one)
            )
            self._say("content", length, found)
            return True
        self._give(calls, end, found)
        return True

    def _bare(self, reader: CallReader, found: list[Delta], final: bool) -> bool:
        """Where no mark announces calls, an answer is calls from its beginning to its end, or text at first."""
        begin = after_space(self._text, 0)
        if begin == len(self._text) and not final:
            raise NeedMore
        try:
            calls, end = reader.read(self._text, begin, final)
        except NotACall as problem:
            self.malformed |= problem.looks
            self._said = True
            return False
        self._give(calls, end, found)
        return True

    def _give(self, calls: Sequence[ToolCall], end: int, found: list[Delta]) -> None:
        self._drop(end)
        self._space = ""
        self._calls += len(calls)
        found += [Delta("tool_call", call=call) for call in calls]

    def _drop(self, length: int) -> None:
        if length and self._reader is not None:
            self._reader.forget()
        self._text = self._text[length:]

    def _say(self, kind: Literal["content", "reasoning"], length: int, found: list[Delta]) -> None:
        """Give out the first `length` characters, but for white space at their end, which waits."""
        text = self._space + self._text[:length]
        self._drop(length)
        if self._trim:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._trim = False
            self._said |= kind == "content"
            found.append(Delta(kind, kept))


def _behind(text: str, mark: str, final: bool) -> int:
    """Where a text goes on behind a mark that may begin it."""
    try:
        return after_literal(text, 0, mark, final)
    except NotACall:
        return 0


def _certain(text: str, marks: Sequence[str]) -> int:
    """How much of a text is certain to be no beginning of a mark."""
    beginnings = (mark[:length] for mark in marks for length in range(1, len(mark)))
    return len(text) - max((len(one) for one in beginnings if text.endswith(one)), default=0)
