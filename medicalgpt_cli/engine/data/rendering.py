"""From messages to token ids: the one place where a chat template meets a tokenizer.

Training and inference share `encode_prompt`, so each answer is learnt behind exactly the tokens that it will
see when the model is used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.answer_windows import first_that_fits
from medicalgpt_cli.engine.data.control_tokens import (
    GUARD,
    ControlTokens,
    control_ids,
    defuse,
    encode_piece,
    encode_rendered,
    is_word,
    token_ids,
)
from medicalgpt_cli.engine.data.formats import Message
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.engine.model.template_check import check_rendered
from medicalgpt_cli.engine.model.tokenizer import start_tokens
from medicalgpt_cli.errors import UsageError

# What a template may raise: of its own, and where a conversation is not what it was written for.
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError),
    *(RecursionError, SyntaxError),
)
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
        found.add(end_of_turn(tokenizer))
    return sorted(token for token in found if token is not None)


@dataclass(frozen=True)
class AnswerHeader:
    """What a template's turns hold between the generation prompt and the answer; the model writes it first.

    gpt-oss, for example, is asked behind `<|start|>assistant` and says `<|channel|>final<|message|>` before it answers.
    """

    text: str  # special tokens spelled out, without spaces around it; "" where the answer comes at once
    ends_in_space: bool  # whether line ends or spaces behind it belong to the header, too
    first: int | None  # its first token where that is special: what else begins with it is another channel
    generation: tuple[int, ...]  # the tokens that a prompt for an answer ends with


def answer_header(tokenizer: PreTrainedTokenizerBase) -> AnswerHeader:
    """The header of this tokenizer's chat template, found by rendering a known answer."""
    return template_facts(tokenizer).header


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

    def fits(place: int) -> bool:
        return encode_within(tokenizer, kept(starts[place]), budget) is not None

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
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[Message] | str, most: int
) -> list[int] | None:
    """Token ids of a conversation or of raw text; None where these are more than `most`.

    What a text that is far too long costs is bounded by `most`, not by the text.

    Raises:
        UsageError: as `encode_prompt`.
    """
    if isinstance(asked, str):
        text, start = defuse(tokenizer, asked, template_facts(tokenizer).asked), encode_raw(tokenizer, "")
    else:
        text, start = render_text(tokenizer, asked, generation=True), []
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
    if not tokenizer.chat_template:
        raise UsageError(
            "the model has no chat template", "give one: --template chatml, alpaca, plain or a file"
        )
    if folds_system(tokenizer, messages):
        messages = _fold_system(messages)
    known = template_facts(tokenizer)
    plain = [
        {
            "role": one["role"],
            "content": defuse(
                tokenizer, one["content"], known.answered if one["role"] == "assistant" else known.asked
            ),
        }
        for one in messages
    ]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generation)
    except _TEMPLATE_ERRORS:
        roles = ", ".join(one["role"] for one in messages[:6])
        raise UsageError(
            f"the chat template refuses the roles {roles}", "user and assistant have to take turns"
        ) from None
    check_rendered(text, sum(len(one["content"]) for one in plain))
    return text


def folds_system(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    """Whether the template has no place for the system message that `messages` begins with."""
    return bool(messages) and messages[0]["role"] == "system" and not template_facts(tokenizer).takes_system


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    system, rest = messages[0], [dict(one) for one in messages[1:]]
    for one in rest:
        if one["role"] == "user":
            one["content"] = f"{system['content']}\n\n{one['content']}"
            return rest
    return [{"role": "user", "content": system["content"]}, *rest]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an answer; the end token where there is no template."""
    return template_facts(tokenizer).end_of_turn


@dataclass(frozen=True)
class TemplateFacts:
    """What a template does, found by using it, so that no list of model families is needed.

    written: control tokens for a document, the special ones. asked: for what users, systems and tools say, every
    added token that is no word. answered: for what an assistant says, the special ones and the marks of turns;
    its reasoning and its calls are its own.
    """

    template: str
    takes_system: bool
    end_of_turn: int | None
    written: ControlTokens
    asked: ControlTokens
    answered: ControlTokens
    header: AnswerHeader


def template_facts(tokenizer: PreTrainedTokenizerBase) -> TemplateFacts:
    cached = getattr(tokenizer, "_medgpt_known", None)
    if cached is None or cached.template != tokenizer.chat_template:
        cached = _find_out(tokenizer)
        tokenizer._medgpt_known = cached
    return cached


def _find_out(tokenizer: PreTrainedTokenizerBase) -> TemplateFacts:
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    if not tokenizer.chat_template:
        asked = special | {number for number, token in added.items() if not is_word(token.content, "")}
        written = ControlTokens.of(tokenizer, special)
        controls = (written, ControlTokens.of(tokenizer, asked), written)
        return TemplateFacts("", True, tokenizer.eos_token_id, *controls, _NO_HEADER)

    def render(*messages: tuple[str, str], generation: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                tokenize=False,
                add_generation_prompt=generation,
            )
        except _TEMPLATE_ERRORS:
            return ""

    asked, answered = control_ids(added, special, render)
    takes_system = "Zq7" in render(("system", "Zq7"), ("user", "a"))
    # The end of a turn is the first special token behind an answer.
    before, _, behind = render(("user", "a"), ("assistant", "Zq7")).rpartition("Zq7")
    ids = encode_piece(tokenizer, behind)
    end = next((one for one in ids if one in special), tokenizer.eos_token_id)
    controls = (ControlTokens.of(tokenizer, some) for some in (special, asked, answered))
    question, prompt = render(("user", "a")), render(("user", "a"), generation=True)
    header = _header(tokenizer, question, prompt, before, special)
    return TemplateFacts(tokenizer.chat_template, takes_system, end, *controls, header)


_NO_HEADER = AnswerHeader("", False, None, ())


def _header(
    tokenizer: PreTrainedTokenizerBase, question: str, prompt: str, before: str, specials: Collection[int]
) -> AnswerHeader:
    """
    Args:
        question: a rendered question. prompt: the same with the generation prompt behind it.
        before: what is rendered up to where the answer to it begins.
    """
    header = before.removeprefix(prompt) if before.startswith(prompt) else ""
    if not header.strip():
        return _NO_HEADER
    first = encode_piece(tokenizer, header.strip())[0]
    generation: list[int] = []
    if prompt.startswith(question):
        # Where the question goes over into the generation prompt, its tokens may be others than alone.
        pair = (encode_piece(tokenizer, one)[::-1] for one in (prompt, prompt.removeprefix(question)))
        same = takewhile(lambda tokens: tokens[0] == tokens[1], zip(*pair, strict=False))
        generation = [token for token, _ in same][::-1]
    return AnswerHeader(
        header.strip(), header != header.rstrip(), first if first in specials else None, tuple(generation)
    )
