"""Spellings of control tokens inside a text: they are plain text, whoever types them.

A patient who types `<|im_end|>` ends no turn, and one who types `<think>` opens no reasoning.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from medicalgpt_cli.engine.model.model_files import is_panic
from medicalgpt_cli.engine.model.tokenizer_check import gave_up

# A character that no text should hold (Unicode noncharacter); stands inside a defused special token.
GUARD = "\ufdd0"


OWN = "\ufdd1"  # behind a guard: the text itself held the guard's character


# What words are made of beside letters, digits and spaces; brackets, bars and underscores are marks.
_OF_WORDS = frozenset("-–—'‘’“”\".,;:!?/%+±×·°℃℉µ▁，。；：！？、（）()…")


@dataclass(frozen=True)
class ControlTokens:
    """Tokens whose spellings are plain text, whoever types them.

    loose: the tokenizer looks for some of them behind its normaliser, so that other spellings become one, too
    (`＜think＞` where it folds full width, `<THINK>` where it lowers).
    """

    ids: frozenset[int]
    spelling: re.Pattern[str] | None
    loose: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> ControlTokens:
        tokens = [tokenizer.added_tokens_decoder[number] for number in ids]
        # A single character cannot be taken apart: it means itself, as a token or as text.
        spellings = sorted({one.content for one in tokens if len(one.content) > 1}, key=len, reverse=True)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        loose = getattr(backend, "normalizer", None) is not None and any(one.normalized for one in tokens)
        pattern = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        # Any text may hold what the vocabulary lacks; that is no mark.
        return cls(frozenset(ids) - {tokenizer.unk_token_id}, pattern, loose)


def control_ids(
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
        if number in special or is_word(token.content, scaffold):
            continue
        asked.add(number)
        if token.content in later or (token.content in scaffold and not _has_twin(token.content, spelt)):
            answered.add(number)
    return asked, answered


def is_word(spelling: str, scaffold: str) -> bool:
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


def defuse(tokenizer: PreTrainedTokenizerBase, text: str, control: ControlTokens) -> str:
    """Put a guard inside every spelling of a control token, so that the tokenizer does not see it as one."""
    text, before = text.replace(GUARD, GUARD + OWN), ""
    while control.spelling and text != before:  # again, where taking one apart has left another one
        before, text = text, control.spelling.sub(lambda match: match[0][0] + GUARD + match[0][1:], text)
    while control.loose and (places := _places(tokenizer, text, control)):
        for place in reversed(places):
            text = text[:place] + GUARD + text[place:]
    return text


def _places(tokenizer: PreTrainedTokenizerBase, text: str, control: ControlTokens) -> list[int]:
    """Where a guard takes apart what the tokenizer still sees as a control token, behind its normaliser."""
    found, begin = [], 0
    for piece in text.split(GUARD):
        shown = GUARD + piece[1:] if piece.startswith(OWN) else piece
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        encoded = tokenizer(shown, **options) if shown else {"input_ids": [], "offset_mapping": []}
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token in control.ids:
                inside = (k for k in range(start + 1, end) if shown[start:k].strip() and shown[k:end].strip())
                place = next(inside, None)
                found += [] if place is None else [begin + place]
        begin += len(piece) + len(GUARD)
    return found


def encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text; the guards of `defuse` fall away."""
    first, *pieces = text.split(GUARD)
    pieces = [GUARD + piece[1:] if piece.startswith(OWN) else piece for piece in pieces]
    return [token for piece in (first, *pieces) for token in encode_piece(tokenizer, piece)]


def encode_piece(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return token_ids(tokenizer, text) if text else []


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Any) -> Any:
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
