"""The answers of a conversation behind their prompts, in time that grows with its length and no faster.

Rendering each answer behind its whole history takes time that grows with the square of the number of turns. How a
template writes a turn hangs on its neighbours and on the beginning of the conversation, hardly ever on how many turns
lie between. So a long conversation is rendered in windows: its beginning, and a few exchanges. What is put together
from windows is compared with whole renderings, and where these differ (a template that numbers its rounds, say), each
answer is rendered behind its whole history after all.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.errors import UsageError

_HEAD = 2  # answers that the beginning of a conversation holds
_BEFORE = 2  # exchanges of a window in front of its first answer
_WINDOW = 4  # answers of a window
_FEW = _HEAD + _BEFORE + 2 * _WINDOW  # answers of a conversation that is rendered whole for each of them


class NotLearnable(Exception):
    """A conversation whose target cannot be rendered as the model would write it; the reason is counted."""


@dataclass(frozen=True)
class Turn:
    """An answer: what stands in front of it at inference, and what is to be learnt."""

    prompt: list[int]
    target: list[int]
    other_header: bool = False  # the generation prompt is not how the template renders an answer


@dataclass(frozen=True)
class Answer:
    """An answer within its conversation."""

    index: int  # of the message
    begin: int  # tokens of its prompt
    target: list[int]
    other_header: bool

    @property
    def end(self) -> int:
        return self.begin + len(self.target)


@dataclass
class Answers:
    """All answers of a conversation.

    input_ids: one row of tokens with all of them, if each prompt begins with the prompt and answer before it;
    else None.
    """

    found: list[Answer] = field(default_factory=list)
    input_ids: list[int] | None = field(default_factory=list)

    def add(self, index: int, turn: Turn, before: Turn | None) -> None:
        """Append an answer.

        Args:
            before: the answer in front of it, rendered in the same window as `turn`; None for the first one.
        """
        said = before.prompt + before.target if before else []
        begin = len(turn.prompt) + (self.found[-1].begin - len(before.prompt) if before else 0)
        if self.input_ids is not None:
            if turn.prompt[: len(said)] == said:
                self.input_ids += turn.prompt[len(said) :] + turn.target
            else:
                self.input_ids = None
        self.found.append(Answer(index, begin, turn.target, turn.other_header))


RenderTurn = Callable[[Sequence[Message]], Turn]  # of the last message, behind all others


def answers_of(messages: Sequence[Message], render: RenderTurn) -> Answers:
    """The answers of a conversation. One that opens it answers nothing, and is only context.

    Raises:
        UsageError: the template refuses the conversation. NotLearnable: an answer cannot be rendered as a target.
    """
    first = next((index for index, one in enumerate(messages) if one["role"] == "user"), len(messages))
    places = [index for index, one in enumerate(messages) if one["role"] == "assistant" and index > first]
    found = _in_windows(messages, places, render) if len(places) > _FEW else None
    return found or _one_by_one(messages, places, render)


def _one_by_one(messages: Sequence[Message], places: Sequence[int], render: RenderTurn) -> Answers:
    found, before = Answers(), None
    for place in places:
        turn = render(messages[: place + 1])
        found.add(place, turn, before)
        before = turn
    return found


def _in_windows(messages: Sequence[Message], places: Sequence[int], render: RenderTurn) -> Answers | None:
    """The same, window by window; None where windows do not say what the whole conversation does."""
    # Where a question follows an answer, turns can be left out without disturbing the order of roles.
    cuts = [
        index
        for index in range(1, len(messages))
        if messages[index]["role"] == "user" and messages[index - 1]["role"] == "assistant"
    ]
    head = next((cut for cut in cuts if cut > places[_HEAD - 1]), len(messages))
    found = Answers()
    before: Turn | None = None
    for start in range(0, len(places), _WINDOW):
        block = places[max(start - 1, 0) : start + _WINDOW]  # begins with the last answer of the block before
        cut = cuts[max(bisect.bisect(cuts, block[0]) - 1 - _BEFORE, 0)] if cuts else 0
        left_out = slice(head, cut) if cut > head else slice(0, 0)
        for place in block:
            try:
                turn = render([*messages[: left_out.start], *messages[left_out.stop : place + 1]])
            except (NotLearnable, UsageError):
                render(messages[: place + 1])  # raises the same, unless it was the window's fault
                return None
            if start and place == block[0]:
                if turn.target != found.found[-1].target:
                    return None
            else:
                appended = found.input_ids is not None
                found.add(place, turn, before)
                if appended and found.input_ids is None and not _rewrites(messages, found, render):
                    return None
            before = turn
    agree = all(_is_whole(messages, found, number, render) for number in (len(places) // 2, -1))
    return found if agree else None


def _rewrites(messages: Sequence[Message], found: Answers, render: RenderTurn) -> bool:
    """Whether the prompt of the last answer found does not begin with the prompt and answer before it."""
    before, turn = (render(messages[: one.index + 1]) for one in found.found[-2:])
    said = before.prompt + before.target
    return turn.prompt[: len(said)] != said


def _is_whole(messages: Sequence[Message], found: Answers, number: int, render: RenderTurn) -> bool:
    """Whether an answer is what it is behind its whole history."""
    answer = found.found[number]
    turn = render(messages[: answer.index + 1])
    same = (len(turn.prompt), turn.target) == (answer.begin, answer.target)
    if found.input_ids is None:
        return same
    return same and found.input_ids[: answer.end] == turn.prompt + turn.target


def first_that_fits(count: int, fits: Callable[[int], bool]) -> int:
    """The lowest of 0 … count - 1 that fits, where all above one that fits do, too; `count` if none does.

    Looks from the end, in steps that double: what fits is short, and what does not may be very long.
    """
    best, step = count, 1
    while best > 0:
        at = max(count - step, 0)
        if not fits(at):
            return bisect.bisect_left(range(count), True, at + 1, best, key=fits)
        best, step = at, step * 2
    return best
