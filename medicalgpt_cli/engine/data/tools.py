"""Calls of tools in what a model writes: how a chat template spells them, and how they are read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.formats import ToolCall
from medicalgpt_cli.engine.data.reasoning import Thinking, split_reasoning


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer taken apart. Joined, the parts are what the model said, without the template's marks."""

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
    """The text of an answer for `parse_answer`: the marks around reasoning and calls stay, also where these are
    special tokens, which an ordinary decoding (`skip_special_tokens=True`) would leave out."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def parse_answer(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: Thinking = "auto",
) -> ParsedAnswer:
    """Take apart what a model wrote behind the prompt of `encode_prompt` with the same `tools` and `thinking`.

    Args:
        text: of `decode_answer`. tools: those that were offered; a call of another one is text. None: any name is one.
    """
    reasoning, content = split_reasoning(text)
    return ParsedAnswer(content, reasoning)


class AnswerStream:
    """The same piece by piece: joined deltas are what `parse_answer` finds in the joined pieces."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: Thinking = "auto",
    ) -> None:
        self._ask = (tokenizer, tools, thinking)
        self._text = ""
        self.malformed = False  # known after `finish`

    def feed(self, piece: str) -> list[Delta]:
        """What is certain after one more piece."""
        self._text += piece
        return []

    def finish(self) -> list[Delta]:
        """What is left when nothing follows."""
        tokenizer, tools, thinking = self._ask
        parsed = parse_answer(tokenizer, self._text, tools=tools, thinking=thinking)
        self.malformed = parsed.malformed
        said = [Delta("reasoning", parsed.reasoning or ""), Delta("content", parsed.content)]
        return [one for one in said if one.text] + [
            Delta("tool_call", call=call) for call in parsed.tool_calls
        ]
