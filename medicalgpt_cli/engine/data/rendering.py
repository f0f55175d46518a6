"""From messages to token ids: the one place where a chat template meets a tokenizer.

Training and inference share `encode_prompt`, so each answer is learnt behind exactly the tokens that it will
see when the model is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.answer_windows import first_that_fits
from medicalgpt_cli.engine.data.control_tokens import (
    GUARD,
    OWN,
    ControlTokens,
    defuse,
    encode_rendered,
    token_ids,
)
from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.reasoning import Thinking, split_reasoning, variables, written_inline
from medicalgpt_cli.engine.data.template_facts import (
    TEMPLATE_ERRORS,
    AnswerHeader,
    TemplateFacts,
    template_facts,
)
from medicalgpt_cli.engine.data.tool_messages import (
    as_functions,
    native_turns,
    plain_turns,
    with_ids,
    with_plain_list,
)
from medicalgpt_cli.engine.model.template_check import check_rendered
from medicalgpt_cli.engine.model.tokenizer import start_tokens
from medicalgpt_cli.errors import UsageError

# A guard that a template has written as JSON does, and not the character that a text itself held.
_ESCAPED_GUARD = re.compile(rf"(?<!\\)((?:\\\\)*)\\u{ord(GUARD):04x}(?!\\u{ord(OWN):04x})")
_PIECE = 16_384  # characters that are tokenised at once where only the number of tokens matters
_LIKELY = 8  # characters a token that a text may have and still be likely to fit
_SEAM = 32  # tokens that a cut through a text can add, and more
# Ends of text of the families whose chat models have another end-of-sequence token.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")


# -- prompts -----------------------------------------------------------------------------------------------


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: Thinking = "auto",
) -> list[int]:
    """Token ids of a conversation up to where the model's answer begins.

    Spellings of control tokens inside a message are encoded as plain text: a patient who types
    `<|im_end|>` ends no turn, and one who types `<think>` opens no reasoning (`ControlTokens`).

    Raises:
        UsageError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    text = render_text(tokenizer, messages, generation=True, tools=tools, thinking=thinking)
    return encode_rendered(tokenizer, text)


def encode_raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, behind the start tokens that the tokenizer sets."""
    text = defuse(tokenizer, text, template_facts(tokenizer).asked)
    return [*start_tokens(tokenizer), *encode_rendered(tokenizer, text)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, without a start token; spellings of special tokens are plain text.

    Other tokens that were added stay tokens: nobody asks in a document, and the model has learnt it with them.
    """
    special = template_facts(tokenizer).written
    odd = {
        index
        for index, text in enumerate(texts)
        if GUARD in text or (special.spelling and special.spelling.search(text))
    }
    plain = [text for index, text in enumerate(texts) if index not in odd]
    encoded = iter(token_ids(tokenizer, plain) if plain else [])
    return [
        encode_rendered(tokenizer, defuse(tokenizer, text, special)) if index in odd else next(encoded)
        for index, text in enumerate(texts)
    ]


def document_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int, bool]:
    """(start, end, separate): the tokens in front of a document, the one behind it, and whether they differ.

    Where a tokenizer sets start tokens (Llama's one, GLM-4's two), a document stands between them and the end-of-text
    token. Else, or where the only start token is the end-of-text token (OPT), one end-of-text token stands between
    documents, and is what the next one begins behind. A chat model's end of turn is no end of text where the
    vocabulary has a token for the latter.
    """
    start = start_tokens(tokenizer)
    specials = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    end = next((specials[one] for one in _ENDS_OF_TEXT if one in specials), tokenizer.eos_token_id)
    separate = start not in ((), (end,))
    return (start if separate else (end,)), end, separate


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> list[int]:
    """Tokens that end an answer: the tokenizer's end token, the template's end of turn, the model's own.

    Raises:
        UsageError: the model's own are no tokens.
    """
    found = {tokenizer.eos_token_id}
    configured = getattr(generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    if not all(one is None or (isinstance(one, int) and not isinstance(one, bool)) for one in ends):
        raise UsageError(
            "the model's generation_config.json: eos_token_id is no token", "a number, or a list of numbers"
        )
    found.update(ends)
    if tokenizer.chat_template:
        found.update((end_of_turn(tokenizer), template_facts(tokenizer).end_of_call))
    return sorted(token for token in found if token is not None)


def answer_header(tokenizer: PreTrainedTokenizerBase) -> AnswerHeader:
    """The header of this tokenizer's chat template, found by rendering a known answer."""
    return template_facts(tokenizer).header


def fit_history(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    budget: int,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: Thinking = "auto",
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

    def fits(place: int) -> bool:
        return encode_within(tokenizer, kept(starts[place]), budget, tools, thinking) is not None

    # What is likely to fit as it is, is tried first. Else the more is left out, the fewer tokens there are.
    last = len(starts) - 1
    characters = sum(len(one["content"]) for one in messages)
    if last == 0 or (characters <= _LIKELY * budget and fits(0)):
        place = 0
    else:
        place = min(first_that_fits(last + 1, fits), last)
    chosen = kept(starts[place])
    return chosen, len(messages) - len(chosen)


def encode_within(
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Message] | str,
    most: int,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: Thinking = "auto",
) -> list[int] | None:
    """Token ids of a conversation or of raw text; None where these are more than `most`.

    What a text that is far too long costs is bounded by `most`, not by the text.

    Raises:
        UsageError: as `encode_prompt`.
    """
    if isinstance(asked, str):
        text, start = defuse(tokenizer, asked, template_facts(tokenizer).asked), encode_raw(tokenizer, "")
    else:
        text, start = render_text(tokenizer, asked, generation=True, tools=tools, thinking=thinking), []
    if _surely_exceeds(tokenizer, text, most):
        return None
    ids = [*start, *encode_rendered(tokenizer, text)]
    return ids if len(ids) <= most else None


def _surely_exceeds(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> bool:
    """Counts piece by piece, no further than the answer needs. False where it is only a little too long."""
    if len(text) <= _PIECE:
        return False
    left = most
    for at in range(0, len(text), _PIECE):
        left -= max(len(encode_rendered(tokenizer, text[at : at + _PIECE])) - _SEAM, 0)
        if left < 0:
            return True
    return False


# -- template and tokenizer --------------------------------------------------------------------------------


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    generation: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: Thinking = "auto",
) -> str:
    """A conversation as the chat template writes it. What others than the template wrote is defused.

    Args:
        generation: with the beginning of the answer that is to follow. tools: that may be called. thinking: whether the
            template asks for reasoning.

    Raises:
        UsageError: there is no template, `thinking` is "on" or "off" and the template has no such switch, or it refuses
            the conversation.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "the model has no chat template", "give one: --template chatml, alpaca, plain or a file"
        )
    facts = template_facts(tokenizer)
    check_template(tokenizer, thinking)
    calls = [len(one.get("tool_calls", ())) for one in messages]
    if max(calls, default=0) > 1 and not facts.tools.several:
        raise TemplateRefuses(
            "the chat template takes one tool call a turn, and a turn has several",
            "give each call a turn of its own, followed by its result",
            "the chat template takes one tool call a turn",
        )
    said = [_defused(tokenizer, facts, one) for one in messages]
    native = facts.tools.way is not None
    turns = (
        native_turns(facts.tools, with_ids(said, short=facts.tools.short_ids))
        if native
        else plain_turns(said)
    )
    turns = [_with_reasoning(facts, one) for one in turns]
    offered = [_defused_value(tokenizer, facts.asked, one) for one in tools]
    if offered and not facts.tools.lists:
        turns, offered = with_plain_list(turns, offered, facts.tools.example), []
    if turns and turns[0]["role"] == "system" and not facts.takes_system:
        turns = _fold_system(turns)
    more: dict[str, Any] = variables(facts.reasoning, thinking)
    if offered:
        more["tools"] = as_functions(offered)
    try:
        text = str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation, **more)
        )
    except TEMPLATE_ERRORS:
        roles = ", ".join(one["role"] for one in messages[:6])
        raise TemplateRefuses(
            f"the chat template refuses the roles {roles}",
            "user and assistant have to take turns",
            "the chat template refuses this order of roles",
        ) from None
    check_rendered(text, sum(map(_size, (turns, offered))))
    return _ESCAPED_GUARD.sub(rf"\1{GUARD}", text) if facts.tools.escapes else text


class TemplateRefuses(UsageError):
    """The chat template does not take a conversation. `reason` says so where such conversations are counted."""

    def __init__(self, message: str, hint: str, reason: str) -> None:
        super().__init__(message, hint)
        self.reason = reason


class NoSwitch(UsageError):
    """The chat template does not turn reasoning on or off."""


def check_template(tokenizer: PreTrainedTokenizerBase, thinking: Thinking) -> None:
    """Whether conversations of texts can be rendered at all, before the first one is.

    Raises:
        UsageError: the chat template leaves out what is said.
        NoSwitch: reasoning is to be turned on or off, and the template cannot do that.
    """
    facts = template_facts(tokenizer)
    if tokenizer.chat_template and not facts.writes:
        raise UsageError(
            "the chat template leaves out what is said in plain text",
            "it may be made for images; another model or --template takes text",
        )
    if thinking != "auto" and facts.reasoning.switch is None:
        raise NoSwitch(
            f"--thinking {thinking}: the chat template has no switch for reasoning",
            "leave --thinking out: it asks for reasoning or not as it was made",
        )


def _defused(tokenizer: PreTrainedTokenizerBase, facts: TemplateFacts, message: Message) -> Message:
    """A message in which spellings of control tokens are plain text.

    What an assistant says may hold marks of reasoning and calls; inside its reasoning and its calls' arguments, which
    have the template's own marks around them, they are text.
    """
    is_answer = message["role"] == "assistant"
    content = defuse(tokenizer, message["content"], facts.answered if is_answer else facts.asked)
    found: Message = {"role": message["role"], "content": content}
    if not is_answer:
        about_call = {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
        return {**found, **_defused_value(tokenizer, facts.asked, about_call)}
    reasoning = message.get("reasoning")
    if reasoning:
        found["reasoning"] = defuse(tokenizer, reasoning, facts.asked)
    elif facts.reasoning.way is not None:
        reasoning, found["content"] = split_reasoning(content)
        if reasoning is not None:
            found["reasoning"] = reasoning
    if message.get("tool_calls"):
        found["tool_calls"] = [_defused_value(tokenizer, facts.asked, one) for one in message["tool_calls"]]
    return found


def _defused_value(tokenizer: PreTrainedTokenizerBase, control: ControlTokens, value: Any) -> Any:
    if isinstance(value, str):
        return defuse(tokenizer, value, control)
    if isinstance(value, Mapping):
        return {
            defuse(tokenizer, str(key), control): _defused_value(tokenizer, control, one)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_defused_value(tokenizer, control, one) for one in value]
    return value


def _with_reasoning(facts: TemplateFacts, turn: dict[str, Any]) -> dict[str, Any]:
    """The reasoning of an assistant's turn where the template looks for it."""
    reasoning = turn.get("reasoning")
    turn = {key: value for key, value in turn.items() if key != "reasoning"}
    if not reasoning or facts.reasoning.way == "stripped":
        return turn
    if facts.reasoning.way == "field":
        return {**turn, "reasoning_content": reasoning}
    return {**turn, "content": written_inline(reasoning, turn["content"] or "")}


def _size(value: Any) -> int:
    """Characters in all texts of a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values())) + sum(map(len, value))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


def folds_system(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    """Whether the template has no place for the system message that `messages` begins with."""
    return bool(messages) and messages[0]["role"] == "system" and not template_facts(tokenizer).takes_system


def _fold_system(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    system, rest = turns[0], [dict(one) for one in turns[1:]]
    for one in rest:
        if one["role"] == "user":
            one["content"] = f"{system['content']}\n\n{one['content']}"
            return rest
    return [{"role": "user", "content": system["content"]}, *rest]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an answer; the end token where there is no template."""
    return template_facts(tokenizer).end_of_turn
