"""From messages to token ids and a loss mask: the one place where a chat template meets a tokenizer.

Training and inference share `encode_prompt`, so each answer is learnt behind exactly the tokens that it will
see when the model is used.
"""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.formats import Conversation, Counts, Message
from medicalgpt_cli.engine.model.model_files import is_panic
from medicalgpt_cli.engine.model.template_check import check_rendered
from medicalgpt_cli.engine.model.tokenizer import start_tokens
from medicalgpt_cli.engine.model.tokenizer_check import gave_up
from medicalgpt_cli.errors import UsageError

IGNORED = -100
# A character that no text should hold (Unicode noncharacter); stands inside a defused special token.
_GUARD = "\ufdd0"
_OWN = "\ufdd1"  # behind a guard: the text itself held the guard's character
# What a template may raise: of its own, and where a conversation is not what it was written for.
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError),
    *(RecursionError, SyntaxError),
)
_PIECE = 16_384  # characters that are tokenised at once where only the number of tokens matters
_SEAM = 32  # tokens that a cut through a text can add, and more
# Ends of text of the families whose chat models have another end-of-sequence token.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")


@dataclass
class Example:
    """What a model trains on: `labels[t]` is `input_ids[t]` where a loss falls, and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    at: str  # file:line
    id: str | None = None


# -- prompts -----------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the model's answer begins.

    Spellings of control tokens inside a message are encoded as plain text: a patient who types
    `<|im_end|>` ends no turn, and one who types `<think>` opens no reasoning (`_Control`).

    Raises:
        UsageError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    return _encode(tokenizer, _render(tokenizer, messages, generation=True))


def encode_raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, behind the start tokens that the tokenizer sets."""
    text = _defuse(tokenizer, text, _known(tokenizer).asked)
    return [*start_tokens(tokenizer), *_encode(tokenizer, text)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, without a start token; spellings of special tokens are plain text.

    Other tokens that were added stay tokens: nobody asks in a document, and the model has learnt it with them.
    """
    special = _known(tokenizer).written
    odd = {
        index
        for index, text in enumerate(texts)
        if _GUARD in text or (special.spelling and special.spelling.search(text))
    }
    plain = [text for index, text in enumerate(texts) if index not in odd]
    encoded = iter(_ids(tokenizer, plain) if plain else [])
    return [
        _encode(tokenizer, _defuse(tokenizer, text, special)) if index in odd else next(encoded)
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
    return _known(tokenizer).header


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


def encode_within(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[Message] | str, most: int
) -> list[int] | None:
    """Token ids of a conversation or of raw text; None where these are more than `most`.

    What a text that is far too long costs is bounded by `most`, not by the text.

    Raises:
        UsageError: as `encode_prompt`.
    """
    if isinstance(asked, str):
        text, start = _defuse(tokenizer, asked, _known(tokenizer).asked), encode_raw(tokenizer, "")
    else:
        text, start = _render(tokenizer, asked, generation=True), []
    if _surely_exceeds(tokenizer, text, most):
        return None
    ids = [*start, *_encode(tokenizer, text)]
    return ids if len(ids) <= most else None


def _surely_exceeds(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> bool:
    """Counts piece by piece, no further than the answer needs. False where it is only a little too long."""
    if len(text) <= _PIECE:
        return False
    left = most
    for at in range(0, len(text), _PIECE):
        left -= max(len(_encode(tokenizer, text[at : at + _PIECE])) - _SEAM, 0)
        if left < 0:
            return True
    return False


# -- training ----------------------------------------------------------------------------------------------


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
    except _NotLearnable as reason:
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
    if _folds_system(tokenizer, conversation.messages):
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
    prompt_text = _render(tokenizer, messages[:-1], generation=True)
    whole_text = _render(tokenizer, messages, generation=False)
    prompt, whole = _encode(tokenizer, prompt_text), _encode(tokenizer, whole_text)
    end = end_of_turn(tokenizer)
    other_header = False
    if whole[: len(prompt)] == prompt:
        target = whole[len(prompt) :]
    elif whole_text.startswith(prompt_text):
        # A token runs over the border: at inference the prompt ends there, so the answer begins a token anew.
        target = _encode(tokenizer, whole_text.removeprefix(prompt_text))
        if tokenizer.decode(prompt + target) != tokenizer.decode(whole):
            raise _NotLearnable("the tokenizer does not give back the answer behind its prompt")
    else:
        # The generation prompt says more than the rendered history (an empty reasoning block, say):
        # what the model has to say after it is the answer itself.
        other_header = True
        answer = _behind_header(prompt_text, messages[-1]["content"])
        target = _encode(tokenizer, _defuse(tokenizer, answer, _known(tokenizer).answered))
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
        raise _NotLearnable("the template opens a reasoning block, and the answer has none")
    return answer


class _NotLearnable(Exception):
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
    except _NotLearnable as problem:
        raise UsageError(str(problem), "another --template may suit these answers") from None
    if len(turn.prompt) + len(turn.target) > max_length:
        return None
    return turn.prompt, turn.target


# -- template and tokenizer --------------------------------------------------------------------------------


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation: bool) -> str:
    if not tokenizer.chat_template:
        raise UsageError(
            "the model has no chat template", "give one: --template chatml, alpaca, plain or a file"
        )
    if _folds_system(tokenizer, messages):
        messages = _fold_system(messages)
    known = _known(tokenizer)
    plain = [
        {
            "role": one["role"],
            "content": _defuse(
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


def _folds_system(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    """Whether the template has no place for the system message that `messages` begins with."""
    return bool(messages) and messages[0]["role"] == "system" and not _known(tokenizer).takes_system


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    system, rest = messages[0], [dict(one) for one in messages[1:]]
    for one in rest:
        if one["role"] == "user":
            one["content"] = f"{system['content']}\n\n{one['content']}"
            return rest
    return [{"role": "user", "content": system["content"]}, *rest]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an answer; the end token where there is no template."""
    return _known(tokenizer).end_of_turn


@dataclass(frozen=True)
class _Control:
    """Tokens whose spellings are plain text, whoever types them.

    loose: the tokenizer looks for some of them behind its normaliser, so that other spellings become one, too
    (`＜think＞` where it folds full width, `<THINK>` where it lowers).
    """

    ids: frozenset[int]
    spelling: re.Pattern[str] | None
    loose: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> _Control:
        tokens = [tokenizer.added_tokens_decoder[number] for number in ids]
        # A single character cannot be taken apart: it means itself, as a token or as text.
        spellings = sorted({one.content for one in tokens if len(one.content) > 1}, key=len, reverse=True)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        loose = getattr(backend, "normalizer", None) is not None and any(one.normalized for one in tokens)
        pattern = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        # Any text may hold what the vocabulary lacks; that is no mark.
        return cls(frozenset(ids) - {tokenizer.unk_token_id}, pattern, loose)


@dataclass(frozen=True)
class _Known:
    """What a template does, found by using it, so that no list of model families is needed.

    written: control tokens for a document, the special ones. asked: for what users, systems and tools say, every
    added token that is no word. answered: for what an assistant says, the special ones and the marks of turns;
    its reasoning and its calls are its own.
    """

    template: str
    takes_system: bool
    end_of_turn: int | None
    written: _Control
    asked: _Control
    answered: _Control
    header: AnswerHeader


def _known(tokenizer: PreTrainedTokenizerBase) -> _Known:
    cached = getattr(tokenizer, "_medgpt_known", None)
    if cached is None or cached.template != tokenizer.chat_template:
        cached = _find_out(tokenizer)
        tokenizer._medgpt_known = cached
    return cached


def _find_out(tokenizer: PreTrainedTokenizerBase) -> _Known:
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    if not tokenizer.chat_template:
        asked = special | {number for number, token in added.items() if not _is_word(token.content, "")}
        written = _Control.of(tokenizer, special)
        controls = (written, _Control.of(tokenizer, asked), written)
        return _Known("", True, tokenizer.eos_token_id, *controls, _NO_HEADER)

    def render(*messages: tuple[str, str], generation: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                tokenize=False,
                add_generation_prompt=generation,
            )
        except _TEMPLATE_ERRORS:
            return ""

    asked, answered = _control_ids(added, special, render)
    takes_system = "Zq7" in render(("system", "Zq7"), ("user", "a"))
    # The end of a turn is the first special token behind an answer.
    before, _, behind = render(("user", "a"), ("assistant", "Zq7")).rpartition("Zq7")
    ids = _encode_piece(tokenizer, behind)
    end = next((one for one in ids if one in special), tokenizer.eos_token_id)
    controls = (_Control.of(tokenizer, some) for some in (special, asked, answered))
    question, prompt = render(("user", "a")), render(("user", "a"), generation=True)
    header = _header(tokenizer, question, prompt, before, special)
    return _Known(tokenizer.chat_template, takes_system, end, *controls, header)


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
    first = _encode_piece(tokenizer, header.strip())[0]
    generation: list[int] = []
    if prompt.startswith(question):
        # Where the question goes over into the generation prompt, its tokens may be others than alone.
        pair = (_encode_piece(tokenizer, one)[::-1] for one in (prompt, prompt.removeprefix(question)))
        same = takewhile(lambda tokens: tokens[0] == tokens[1], zip(*pair, strict=False))
        generation = [token for token, _ in same][::-1]
    return AnswerHeader(
        header.strip(), header != header.rstrip(), first if first in specials else None, tuple(generation)
    )


def _control_ids(
    added: Mapping[int, AddedToken], special: set[int], render: Callable[..., str]
) -> tuple[set[int], set[int]]:
    """Which added tokens are no content: in what others say, and in what an assistant says.

    A mark of a turn is written by the template itself: around a later question, or else around turns without a closing
    twin. `<think>` and `</think>` are twins, which some templates write as well, and belong to what is said.
    """
    first = (("user", "Zq7"), ("assistant", "Zq7"))
    before, after = render(*first), render(*first, ("user", "Zq7"))
    later = after.removeprefix(before) if after.startswith(before) else ""
    around = [render(("system", "Zq7"), *first[:1]), render(*first[:1], generation=True), before, later]
    scaffold = "".join(around)
    spelt = {token.content for token in added.values()}
    asked, answered = set(special), set(special)
    for number, token in added.items():
        if number in special or _is_word(token.content, scaffold):
            continue
        asked.add(number)
        if token.content in later or (token.content in scaffold and not _has_twin(token.content, spelt)):
            answered.add(number)
    return asked, answered


# What words are made of beside letters, digits and spaces; brackets, bars and underscores are marks.
_OF_WORDS = frozenset("-–—'‘’“”\".,;:!?/%+±×·°℃℉µ▁，。；：！？、（）()…")


def _is_word(spelling: str, scaffold: str) -> bool:
    """Whether an added token is content, such as a domain's words or runs of spaces, and no control token.

    What `medgpt vocabulary` adds stands in the vocabulary itself and is none of the added tokens. Others add words as
    such tokens, too. By its form, a word has letters, digits, spaces and the punctuation of prose. One with punctuation
    that the template writes itself (`USER:`) is a mark all the same.

    Args:
        scaffold: what the template writes around messages.
    """
    marks = {
        one
        for one in spelling
        if not (one.isalnum() or one.isspace() or unicodedata.category(one).startswith("M"))
    }
    return not marks or (marks <= _OF_WORDS and spelling not in scaffold)


def _has_twin(spelling: str, others: Collection[str]) -> bool:
    """Whether a token opens what another one closes, or closes what it opens: `<x>` and `</x>`, `[X]` and `[/X]`."""
    twin = spelling[0] + spelling[2:] if spelling[1:2] == "/" else spelling[0] + "/" + spelling[1:]
    return twin in others


def _defuse(tokenizer: PreTrainedTokenizerBase, text: str, control: _Control) -> str:
    """Put a guard inside every spelling of a control token, so that the tokenizer does not see it as one."""
    text, before = text.replace(_GUARD, _GUARD + _OWN), ""
    while control.spelling and text != before:  # again, where taking one apart has left another one
        before, text = text, control.spelling.sub(lambda match: match[0][0] + _GUARD + match[0][1:], text)
    while control.loose and (places := _places(tokenizer, text, control)):
        for place in reversed(places):
            text = text[:place] + _GUARD + text[place:]
    return text


def _places(tokenizer: PreTrainedTokenizerBase, text: str, control: _Control) -> list[int]:
    """Where a guard takes apart what the tokenizer still sees as a control token, behind its normaliser."""
    found, begin = [], 0
    for piece in text.split(_GUARD):
        shown = _GUARD + piece[1:] if piece.startswith(_OWN) else piece
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        encoded = tokenizer(shown, **options) if shown else {"input_ids": [], "offset_mapping": []}
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token in control.ids:
                inside = (k for k in range(start + 1, end) if shown[start:k].strip() and shown[k:end].strip())
                place = next(inside, None)
                found += [] if place is None else [begin + place]
        begin += len(piece) + len(_GUARD)
    return found


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text; the guards of `_defuse` fall away."""
    first, *pieces = text.split(_GUARD)
    pieces = [_GUARD + piece[1:] if piece.startswith(_OWN) else piece for piece in pieces]
    return [token for piece in (first, *pieces) for token in _encode_piece(tokenizer, piece)]


def _encode_piece(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return _ids(tokenizer, text) if text else []


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Any) -> Any:
    """Token ids of a text, or of each of several, without a start token.

    Raises:
        UnsafeRefused: the library gives up on one.
    """
    try:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    except BaseException as problem:  # a panic is no Exception
        if is_panic(problem):
            raise gave_up() from None
        raise
