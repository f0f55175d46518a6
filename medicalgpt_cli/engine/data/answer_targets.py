"""One answer as a target: the prompt in front of it at inference, and what a model has to write behind that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.answer_windows import NotLearnable, Turn
from medicalgpt_cli.engine.data.calls import NAME
from medicalgpt_cli.engine.data.control_tokens import defuse, encode_rendered
from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.reasoning import Thinking, split_reasoning
from medicalgpt_cli.engine.data.rendering import fit_history, render_text
from medicalgpt_cli.engine.data.template_facts import template_facts


@dataclass(frozen=True)
class AnswerRenderer:
    """Renders the answers of one conversation.

    tools: that its assistant may call. thinking: with "auto", answers stand behind the prompt that inference has by
    itself; only where that one has closed the reasoning, those with reasoning stand behind the prompt that asks for it.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: Thinking = "auto"

    def turn(self, messages: Sequence[Message]) -> Turn:
        """The last message behind all others.

        Raises:
            UsageError: the template refuses the conversation. NotLearnable: it is no target.
        """
        turn = answer_turn(self.tokenizer, messages, self.tools, self._setting(messages[-1]))
        if not self._closes_by_itself(messages[-1]):
            return turn
        closed = answer_turn(self.tokenizer, messages, self.tools, "off")
        if closed.prompt[: len(turn.prompt)] != turn.prompt:
            return turn
        # The empty block in the tokens of the prompt of "off": asked in either way, a model meets what it has learnt.
        return Turn(turn.prompt, closed.prompt[len(turn.prompt) :] + closed.target, turn.other_header)

    def _closes_by_itself(self, answer: Message) -> bool:
        """Whether an answer begins with an empty block which another prompt would hold already."""
        facts = template_facts(self.tokenizer).reasoning
        default = self._setting(answer) == "auto" and facts.way is not None
        return default and "off" in facts.closed and "auto" not in facts.closed and not reasoning_of(answer)

    def history(self, messages: Sequence[Message], answer: Message, budget: int) -> list[Message]:
        """What of the messages in front of an answer fits, without the oldest exchanges (`fit_history`)."""
        kept, _ = fit_history(self.tokenizer, messages, budget, self.tools, self._setting(answer))
        return kept

    def _setting(self, answer: Message) -> Thinking:
        facts = template_facts(self.tokenizer).reasoning
        if self.thinking != "auto" or facts.switch is None or facts.way is None:
            return self.thinking
        return "on" if reasoning_of(answer) and "auto" in facts.closed else "auto"

    def notes(self, messages: Sequence[Message]) -> list[str]:
        """What happens to reasoning and tools of a conversation beside being written where the template has them."""
        facts = template_facts(self.tokenizer)
        answers = [one for one in messages if one["role"] == "assistant"]
        reasoning = [one for one in answers if reasoning_of(one)]
        said = {
            "reasoning written as <think>…</think> in front of the answer: the template has no place for it": (
                facts.reasoning.way is None and any(one.get("reasoning") for one in answers)
            ),
            "reasoning left out: the prompt for an answer has closed it already": any(
                self._setting(one) in facts.reasoning.closed for one in reasoning
            ),
            "answer without reasoning learnt as one, in a template that has a place for reasoning": (
                facts.reasoning.way is not None
                and any(
                    self._setting(one) not in facts.reasoning.closed
                    for one in answers
                    if not reasoning_of(one)
                )
            ),
            "reasoning learnt behind the prompt of --thinking on, which is not the default": (
                self.thinking == "auto" and any(self._setting(one) == "on" for one in reasoning)
            ),
        }
        others = [note for note, holds in said.items() if holds]
        return [*tool_notes(self.tokenizer, messages, self.tools), *others]


def tool_notes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What happens to tools and calls of a conversation beside being written where the template has them."""
    facts = template_facts(tokenizer).tools
    calls = [one for one in messages if one.get("tool_calls")]
    said = {
        "tools written in a plain form: the template has no place for them": (
            (facts.way is None and (bool(calls) or any(one["role"] == "tool" for one in messages)))
            or (bool(tools) and not facts.lists)
        ),
        "calls of tools that cannot be read back: the form in which the template has them is unknown": (
            bool(calls) and facts.form is None
        ),
        "calls of tools that cannot be read back: a name is more than letters, digits and . : / _ -": any(
            not NAME.fullmatch(call["name"]) for one in calls for call in one["tool_calls"]
        ),
        "text in front of a tool call left out: the template has no place for it": (
            not facts.beside and any(one["content"].strip() for one in calls)
        ),
    }
    return [note for note, holds in said.items() if holds]


def reasoning_of(answer: Message) -> str | None:
    """An assistant's reasoning, also where it stands inline."""
    return answer.get("reasoning") or split_reasoning(answer["content"])[0]


def answer_turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: Thinking = "auto",
) -> Turn:
    """The last message as a target: what a model has to write behind the prompt, to the end of the turn.

    Raises:
        UsageError: the template refuses the conversation. NotLearnable: it is no target.
    """
    facts = template_facts(tokenizer)
    *history, answer = messages
    if thinking in facts.reasoning.closed:
        answer = {**answer, "content": split_reasoning(answer["content"])[1]}
        answer.pop("reasoning", None)
    prompt_text = render_text(tokenizer, history, generation=True, tools=tools, thinking=thinking)
    whole_text = render_text(tokenizer, [*history, answer], generation=False, tools=tools, thinking=thinking)
    prompt, whole = encode_rendered(tokenizer, prompt_text), encode_rendered(tokenizer, whole_text)
    puts_together = facts.reasoning.way == "stripped" and reasoning_of(answer) is not None
    other_header = puts_together or not whole_text.startswith(prompt_text)
    if other_header:
        # The generation prompt says more than the rendered history (an opened reasoning block, say), or the template
        # takes the reasoning away: what the model has to say behind the prompt is put together.
        asked_text = render_text(tokenizer, history, generation=False, tools=tools, thinking=thinking)
        text = _put_together(tokenizer, answer, asked_text, prompt_text, whole_text, thinking)
        target = encode_rendered(tokenizer, text)
    elif whole[: len(prompt)] == prompt:
        target = whole[len(prompt) :]
    else:
        # A token runs over the border: at inference the prompt ends there, so the answer begins a token anew.
        target = encode_rendered(tokenizer, whole_text.removeprefix(prompt_text))
        if tokenizer.decode(prompt + target) != tokenizer.decode(whole):
            raise NotLearnable("the tokenizer does not give back the answer behind its prompt")
    called = answer.get("tool_calls") and facts.tools.way is not None
    end = facts.end_of_call if called else facts.end_of_turn
    target = target[: target.index(end) + 1] if end in target else [*target, _or_eos(tokenizer, end, called)]
    return Turn(prompt, target, other_header)


def _or_eos(tokenizer: PreTrainedTokenizerBase, end: int | None, called: Any) -> int:
    return end if called and end is not None else tokenizer.eos_token_id


def _put_together(
    tokenizer: PreTrainedTokenizerBase,
    answer: Message,
    asked: str,
    prompt: str,
    whole: str,
    thinking: Thinking,
) -> str:
    """What stands behind the prompt: reasoning that the template does not render, and the answer as it renders it.

    Args:
        asked: the rendered history without a generation prompt; `prompt` with one; `whole` with the answer.
    """
    facts = template_facts(tokenizer)
    opens, closes = facts.reasoning.open, facts.reasoning.close
    header = prompt.removeprefix(asked) if prompt.startswith(asked) else ""
    before = header.rpartition(opens.strip())[0] if opens.strip() in header else header
    opened = thinking in facts.reasoning.opened
    if header and whole.startswith(asked + before):
        body = whole.removeprefix(asked + before)
    elif answer.get("tool_calls"):
        raise NotLearnable("the template renders this call otherwise than behind its prompt")
    else:
        body = defuse(tokenizer, split_reasoning(answer["content"])[1], facts.answered)
    if opened and body.lstrip().startswith(opens.strip()):
        return body.lstrip().removeprefix(opens.strip()).removeprefix("\n")
    if facts.reasoning.way != "stripped" and not opened:
        return body
    reasoning = defuse(tokenizer, (reasoning_of(answer) or "").strip(), facts.asked)
    if not opened and not reasoning:
        return body
    return f"{'' if opened else opens}{reasoning}{closes}{body}"
