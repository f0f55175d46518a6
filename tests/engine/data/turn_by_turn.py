"""The plain way to examples, kept as a reference: each answer is rendered behind its whole history.

What is too long is tried from each exchange on. That takes time that grows with the cube of the number of turns.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.answer_targets import AnswerRenderer
from medicalgpt_cli.engine.data.answer_targets import answer_turn as _turn
from medicalgpt_cli.engine.data.answer_windows import NotLearnable
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import IGNORED, Example
from medicalgpt_cli.engine.data.messages import Conversation, Message
from medicalgpt_cli.engine.data.rendering import encode_within, folds_system
from medicalgpt_cli.errors import UsageError


def render_turn_by_turn(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, max_length: int, counts: Counts
) -> list[Example]:
    try:
        found = _examples(tokenizer, conversation, max_length, counts)
    except UsageError:
        counts.add_skip("the chat template refuses this order of roles", conversation.at)
        return []
    except NotLearnable as reason:
        counts.add_skip(str(reason), conversation.at)
        return []
    for one in found:
        one.at, one.id = conversation.at, conversation.id
    return found


def _examples(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, max_length: int, counts: Counts
) -> list[Example]:
    turns = _turns(tokenizer, conversation.messages)
    if any(turn.other_header for turn in turns):
        counts.add_merge(
            "answer learnt behind a header that the template leaves out of the history", conversation.at
        )
    if folds_system(tokenizer, conversation.messages):
        counts.add_merge("system message put in front of the first question", conversation.at)
    for note in AnswerRenderer(tokenizer).notes(conversation.messages):
        counts.add_merge(note, conversation.at)
    example = _append_only(turns)
    if example is None and len(turns) > 1:
        counts.add_merge(
            "one example a turn: the template renders earlier turns differently", conversation.at
        )
        ends = [turn.index + 1 for turn in turns]
        parts = [
            _fit_last(tokenizer, conversation.messages[:end], max_length, counts, conversation.at)
            for end in ends
        ]
    elif example is None or len(example.input_ids) > max_length:
        parts = [_fit(tokenizer, conversation, turns, max_length, counts)]
    else:
        parts = [example]
    return [part for part in parts if part is not None]


@dataclass(frozen=True)
class _Turn:
    index: int
    prompt: list[int]
    target: list[int]
    other_header: bool


def _turn_at(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> _Turn:
    turn = _turn(tokenizer, messages)
    return _Turn(len(messages) - 1, turn.prompt, turn.target, turn.other_header)


def _turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[_Turn]:
    """The assistant turns of a conversation. One that opens it answers nothing, and is only context."""
    return [
        _turn_at(tokenizer, messages[: index + 1])
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and any(one["role"] == "user" for one in messages[:index])
    ]


def _append_only(turns: Sequence[_Turn]) -> Example | None:
    """All turns in one example, if each prompt begins with the prompt and answer before it; else None."""
    if not turns:
        return None
    for earlier, later in pairwise(turns):
        said = earlier.prompt + earlier.target
        if later.prompt[: len(said)] != said:
            return None
    input_ids = turns[-1].prompt + turns[-1].target
    labels = [IGNORED] * len(input_ids)
    for turn in turns:
        labels[len(turn.prompt) : len(turn.prompt) + len(turn.target)] = turn.target
    return Example(input_ids, labels, at="")


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    turns: Sequence[_Turn],
    max_length: int,
    counts: Counts,
) -> Example | None:
    """The newest exchanges that fit together; the oldest go first, the system message stays."""
    messages = list(conversation.messages)
    first = 1 if messages[0]["role"] == "system" else 0
    users = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
    length = len(turns[-1].prompt) + len(turns[-1].target)
    for start in users:
        kept = [*messages[:first], *messages[start:]]
        example = _append_only(_turns(tokenizer, kept))
        if example is not None and len(example.input_ids) <= max_length:
            counts.add_truncation(
                "oldest exchanges dropped to fit --max-length",
                conversation.at,
                length - len(example.input_ids),
            )
            return example
    return _fit_last(tokenizer, messages, max_length, counts, conversation.at)


def _fit_last(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int, counts: Counts, at: str
) -> Example | None:
    """The last answer behind as much of its history as fits; its end is cut where it alone is too long."""
    whole = _turn_at(tokenizer, messages)
    question, _ = fit_history(tokenizer, messages[:-1], max_length - len(whole.target))
    turn = _turn_at(tokenizer, [*question, messages[-1]])
    lost = len(whole.prompt) - len(turn.prompt)
    if len(turn.prompt) >= max_length:
        counts.add_skip("the question alone fills --max-length", at)
        return None
    target = turn.target[: max_length - len(turn.prompt)]
    if len(target) < len(turn.target):
        counts.add_truncation(
            "end of the answer cut to fit --max-length", at, lost + len(turn.target) - len(target)
        )
    elif lost:
        counts.add_truncation("oldest exchanges dropped to fit --max-length", at, lost)
    return Example(turn.prompt + target, [IGNORED] * len(turn.prompt) + target, at=at)


def fit_history(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], budget: int
) -> tuple[list[Message], int]:
    """Drop the oldest exchanges until the prompt fits `budget` tokens; a system message stays.

    Returns:
        The messages that are left and how many were dropped. The newest user message always stays,
        also where it alone is too long: the caller decides about that.
    """
    first = 1 if messages and messages[0]["role"] == "system" else 0
    starts = [first, *(at for at in range(first + 1, len(messages)) if messages[at]["role"] == "user")]

    def kept(start: int) -> list[Message]:
        return [*messages[:first], *messages[start:]]

    def fits(start: int) -> bool:
        return encode_within(tokenizer, kept(start), budget) is not None

    # The more is left out, the fewer tokens there are: halving finds the place in a few renderings.
    last = len(starts) - 1
    place = 0 if last == 0 or fits(starts[0]) else bisect.bisect_left(starts, True, 1, last, key=fits)
    chosen = kept(starts[place])
    return chosen, len(messages) - len(chosen)
