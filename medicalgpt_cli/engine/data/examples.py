"""From conversations to what a model trains on: token ids, and a loss mask over every assistant turn.

Each answer is learnt behind exactly the tokens that inference renders in front of it (`rendering.encode_prompt`).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.answer_targets import AnswerRenderer, answer_turn
from medicalgpt_cli.engine.data.answer_windows import (
    Answer,
    Answers,
    NotLearnable,
    answers_of,
    first_that_fits,
)
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.messages import Conversation, Message
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.engine.data.rendering import TemplateRefuses, check_template, fit_history, folds_system
from medicalgpt_cli.errors import UsageError

IGNORED = -100


@dataclass
class Example:
    """What a model trains on: `labels[t]` is `input_ids[t]` where a loss falls, and -100 elsewhere.

    `weights[t]` is what the loss of label t is multiplied by; None where that is 1 for all.
    """

    input_ids: list[int]
    labels: list[int]
    at: str  # file:line
    id: str | None = None
    weights: list[float] | None = None


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    max_length: int,
    counts: Counts,
    thinking: Thinking = "auto",
) -> list[Example]:
    """Examples of a conversation, with the loss on every assistant turn and its end token.

    One example holds all turns if the template only ever appends. Where it rewrites what was said before
    (strips reasoning, moves the system message), each assistant turn becomes an example of its own.
    What does not fit `max_length` loses its oldest exchanges; all of that is counted in `counts`.
    An answer with weight 0 is context, and one with another weight than 1 gives its tokens that weight.
    Calls of tools are answers; their results are context.

    Raises:
        UsageError: there is no chat template, or it has no switch for `thinking`.
    """
    check_template(tokenizer, thinking)
    try:
        renderer = AnswerRenderer(tokenizer, conversation.tools, thinking)
        found = _examples(renderer, conversation, max_length, counts)
    except TemplateRefuses as problem:
        counts.add_skip(problem.reason, conversation.at)
        return []
    except NotLearnable as reason:
        counts.add_skip(str(reason), conversation.at)
        return []
    for one in found:
        one.at, one.id = conversation.at, conversation.id
    return found


def _examples(
    renderer: AnswerRenderer, conversation: Conversation, max_length: int, counts: Counts
) -> list[Example]:
    at = conversation.at
    messages = _to_last_learnt(conversation, counts)
    answers = answers_of(messages, renderer.turn)
    if any(answer.other_header for answer in answers.found):
        counts.add_merge("answer learnt behind a header that the template leaves out of the history", at)
    if folds_system(renderer.tokenizer, messages):
        counts.add_merge("system message put in front of the first question", at)
    for note in renderer.notes(messages):
        counts.add_merge(note, at)
    if answers.input_ids is None:
        counts.add_merge("one example a turn: the template renders earlier turns differently", at)
        parts = [
            _fit_last(renderer, messages, answer, max_length, counts, at)
            for answer in answers.found
            if _weight(messages[answer.index])
        ]
    elif len(answers.input_ids) > max_length:
        parts = [_fit(renderer, messages, answers, max_length, counts, at)]
    else:
        parts = [_together(messages, answers)]
    return [part for part in parts if part is not None]


def uncut_lengths(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, thinking: Thinking = "auto"
) -> list[int]:
    """How many tokens each example of a conversation has where none is cut; empty where nothing can be learnt."""
    try:
        messages = _to_last_learnt(conversation, Counts())
        answers = answers_of(messages, AnswerRenderer(tokenizer, conversation.tools, thinking).turn)
    except (NotLearnable, TemplateRefuses):
        return []
    if answers.input_ids is not None:
        return [len(answers.input_ids)]
    return [answer.end for answer in answers.found if _weight(messages[answer.index])]


def _weight(message: Message) -> float:
    return message.get("weight", 1.0)


def _to_last_learnt(conversation: Conversation, counts: Counts) -> Sequence[Message]:
    """The turns up to the last answer with a weight above 0; what stands behind it is context of nothing."""
    messages = conversation.messages
    answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    learnt = [index for index in answers if _weight(messages[index]) > 0]
    if not learnt:
        raise NotLearnable(
            "no answer to learn from: all have weight 0" if answers else "no answer to learn from"
        )
    for _ in range(bisect.bisect(answers, learnt[-1]) - len(learnt)):
        counts.add_merge("turns with weight 0 are context", conversation.at)
    if learnt[-1] < len(messages) - 1:
        counts.add_merge("turns behind the last answer to learn left out", conversation.at)
    return messages[: learnt[-1] + 1]


def _together(messages: Sequence[Message], answers: Answers) -> Example:
    """All answers in one example."""
    assert answers.input_ids is not None
    example = Example(answers.input_ids, [IGNORED] * len(answers.input_ids), at="")
    for answer in answers.found:
        _learn(example, answer.begin, answer.target, _weight(messages[answer.index]))
    return example


def _learn(example: Example, begin: int, target: Sequence[int], weight: float) -> None:
    """Put a loss on a stretch of an example."""
    if weight == 0:
        return
    place = slice(begin, begin + len(target))
    example.labels[place] = target
    if weight != 1:
        example.weights = example.weights or [1.0] * len(example.labels)
        example.weights[place] = [weight] * len(target)


def _fit(
    renderer: AnswerRenderer,
    messages: Sequence[Message],
    answers: Answers,
    max_length: int,
    counts: Counts,
    at: str,
) -> Example | None:
    """The newest exchanges that fit together; the oldest go first, the system message stays."""
    first = 1 if messages[0]["role"] == "system" else 0
    users = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]

    def kept(number: int) -> list[Message]:
        return [*messages[:first], *messages[users[number] :]]

    def fits(number: int) -> bool:
        turn = renderer.turn(kept(number))
        return len(turn.prompt) + len(turn.target) <= max_length

    for number in range(first_that_fits(len(users), fits), len(users)):
        shorter = answers_of(kept(number), renderer.turn)
        if shorter.input_ids is not None and len(shorter.input_ids) <= max_length:
            lost = answers.found[-1].end - len(shorter.input_ids)
            counts.add_truncation("oldest exchanges dropped to fit --max-length", at, lost)
            return _together(kept(number), shorter)
    return _fit_last(renderer, messages, answers.found[-1], max_length, counts, at)


def _fit_last(
    renderer: AnswerRenderer,
    messages: Sequence[Message],
    answer: Answer,
    max_length: int,
    counts: Counts,
    at: str,
) -> Example | None:
    """One answer behind as much of its history as fits; its end is cut where it alone is too long."""
    said = messages[answer.index]
    question = renderer.history(messages[: answer.index], said, max_length - len(answer.target))
    turn = renderer.turn([*question, said])
    lost = answer.begin - len(turn.prompt)
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
    example = Example(turn.prompt + target, [IGNORED] * (len(turn.prompt) + len(target)), at=at)
    _learn(example, len(turn.prompt), target, _weight(messages[answer.index]))
    return example


def render_answer(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answer: str | Message,
    max_length: int,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[int], list[int]] | None:
    """Token ids of a prompt and of an answer to it, with the token that ends the answer.

    The oldest exchanges give way where both do not fit; the answer is never cut, because what is judged is
    the whole of it. None where it does not fit behind its question alone. Answers that are compared stand behind one
    prompt, that of the template's default, whether they have reasoning or not.

    Args:
        answer: a text, or an assistant's message with its reasoning and calls. tools: that could be called.

    Raises:
        UsageError: the template refuses the conversation.
    """
    said: Message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    try:
        turn = answer_turn(tokenizer, [*messages, said], tools)
        if len(turn.prompt) + len(turn.target) > max_length:
            kept, _ = fit_history(tokenizer, messages, max_length - len(turn.target), tools)
            turn = answer_turn(tokenizer, [*kept, said], tools)
    except NotLearnable as problem:
        raise UsageError(str(problem), "another --template may suit these answers") from None
    if len(turn.prompt) + len(turn.target) > max_length:
        return None
    return turn.prompt, turn.target
