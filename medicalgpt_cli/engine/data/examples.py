"""From conversations to what a model trains on: token ids, and a loss mask over every assistant turn.

Each answer is learnt behind exactly the tokens that inference renders in front of it (`rendering.encode_prompt`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.control_tokens import defuse, encode_rendered
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.messages import Conversation, Message
from medicalgpt_cli.engine.data.rendering import (
    end_of_turn,
    fit_history,
    folds_system,
    render_text,
    template_facts,
)
from medicalgpt_cli.errors import UsageError

IGNORED = -100


@dataclass
class Example:
    """What a model trains on: `labels[t]` is `input_ids[t]` where a loss falls, and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    at: str  # file:line
    id: str | None = None


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, max_length: int, counts: Counts
) -> list[Example]:
    """Examples of a conversation, with the loss on every assistant turn and its end token.

    One example holds all turns if the template only ever appends. Where it rewrites what was said before
    (strips reasoning, moves the system message), each assistant turn becomes an example of its own.
    What does not fit `max_length` loses its oldest exchanges; all of that is counted in `counts`.
    """
    try:
        found = _examples(tokenizer, conversation, max_length, counts)
    except UsageError:
        if not tokenizer.chat_template:
            raise
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
    """An answer: which message it is, what stands in front of it at inference, and what is to be learnt."""

    index: int
    prompt: list[int]
    target: list[int]
    other_header: bool = False  # the generation prompt is not how the template renders an answer


def _turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[_Turn]:
    """The assistant turns of a conversation. One that opens it answers nothing, and is only context."""
    return [
        _turn(tokenizer, messages[: index + 1])
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and any(one["role"] == "user" for one in messages[:index])
    ]


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> _Turn:
    """The last message as a target: what the template writes behind the prompt, to the end of the turn."""
    prompt_text = render_text(tokenizer, messages[:-1], generation=True)
    whole_text = render_text(tokenizer, messages, generation=False)
    prompt, whole = encode_rendered(tokenizer, prompt_text), encode_rendered(tokenizer, whole_text)
    end = end_of_turn(tokenizer)
    other_header = False
    if whole[: len(prompt)] == prompt:
        target = whole[len(prompt) :]
    elif whole_text.startswith(prompt_text):
        # A token runs over the border: at inference the prompt ends there, so the answer begins a token anew.
        target = encode_rendered(tokenizer, whole_text.removeprefix(prompt_text))
        if tokenizer.decode(prompt + target) != tokenizer.decode(whole):
            raise NotLearnable("the tokenizer does not give back the answer behind its prompt")
    else:
        # The generation prompt says more than the rendered history (an empty reasoning block, say):
        # what the model has to say after it is the answer itself.
        other_header = True
        answer = _behind_header(prompt_text, messages[-1]["content"])
        target = encode_rendered(tokenizer, defuse(tokenizer, answer, template_facts(tokenizer).answered))
    if end in target:
        target = target[: target.index(end) + 1]
    else:
        target = [*target, tokenizer.eos_token_id]
    return _Turn(len(messages) - 1, prompt, target, other_header)


def _behind_header(prompt_text: str, answer: str) -> str:
    """The answer without the opening that the generation prompt already wrote (`<think>`, say)."""
    opening = re.match(r"<[^<>]+>\n*", answer)
    if opening and prompt_text.endswith(opening[0]):
        return answer.removeprefix(opening[0])
    if prompt_text.rstrip().endswith("<think>"):
        raise NotLearnable("the template opens a reasoning block, and the answer has none")
    return answer


class NotLearnable(Exception):
    """A conversation whose target cannot be rendered as the model would write it; the reason is counted."""


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
    whole = _turn(tokenizer, messages)
    question, _ = fit_history(tokenizer, messages[:-1], max_length - len(whole.target))
    turn = _turn(tokenizer, [*question, messages[-1]])
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


def render_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str, max_length: int
) -> tuple[list[int], list[int]] | None:
    """Token ids of a prompt and of an answer to it, with the token that ends the answer.

    The oldest exchanges give way where both do not fit; the answer is never cut, because what is judged is
    the whole of it. None where it does not fit behind its question alone.

    Raises:
        UsageError: the template refuses the conversation.
    """
    try:
        turn = _turn(tokenizer, [*messages, {"role": "assistant", "content": answer}])
        if len(turn.prompt) + len(turn.target) > max_length:
            kept, _ = fit_history(tokenizer, messages, max_length - len(turn.target))
            turn = _turn(tokenizer, [*kept, {"role": "assistant", "content": answer}])
    except NotLearnable as problem:
        raise UsageError(str(problem), "another --template may suit these answers") from None
    if len(turn.prompt) + len(turn.target) > max_length:
        return None
    return turn.prompt, turn.target
