"""New entries for a tokenizer's model, on the dictionary of its `tokenizer.json`: no files, no weights.

What both kinds keep to: an id once given never moves, and a text in which no new token appears has exactly
the tokens that it had before.

BPE. New merges stand behind all old ones, so they only ever join what the old merges leave. A merge never
spells an old token: what it makes can then only be joined by new merges, and every text that a new merge
touches ends in a new token.

Unigram. A new piece scores a little more than the best way to spell it without it, and no less than the
lowest old score, which decides how unknown characters are weighed. Old paths keep their scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from medicalgpt_cli.errors import UsageError

_UNKNOWN_PENALTY = 10.0  # below the lowest score; the constant of SentencePiece and `tokenizers`
_BETTER = 1e-4  # by how much a new Unigram piece beats its old spelling

KNOWN_OTHERWISE = "the base spells it with tokens that it cannot reach"
OVER_LIMIT = "over --max-new"


@dataclass(frozen=True)
class Piece:
    """A word of the corpus that may become a token."""

    text: str
    symbols: str  # how the tokenizer's model sees it: byte letters, or ▁ for a space
    count: int  # uses in the corpus, as the SentencePiece model cuts it
    was: int  # tokens of the base

    @property
    def saved(self) -> int:
        return self.count * (self.was - 1)


@dataclass
class Extension:
    """A widened tokenizer: its dictionary, and what is new in it."""

    tokenizer: dict[str, Any]
    first_id: int
    ids: dict[str, int] = field(default_factory=dict)  # symbols of every new token: id, in the order of ids
    pieces: list[Piece] = field(default_factory=list)  # the ones that were added
    left_out: Counter[str] = field(default_factory=Counter)

    def take(self, piece: Piece, symbols: Sequence[str]) -> None:
        """Give ids to the new symbols of a piece."""
        for one in symbols:
            self.ids[one] = self.first_id + len(self.ids)
        self.pieces.append(piece)


def check_kind(tokenizer: dict[str, Any]) -> None:
    """Refuse kinds of tokenizers that cannot be widened.

    Raises:
        UsageError: neither BPE nor Unigram.
    """
    model = tokenizer["model"]
    kind = model.get("type") or "unnamed"
    if kind == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        kind = "BPE with marks at word borders"
    if kind not in ("BPE", "Unigram"):
        raise UsageError(
            f"a {kind} tokenizer cannot be widened", "the base model needs a BPE or Unigram tokenizer"
        )


def extend_tokenizer(
    tokenizer: dict[str, Any],
    pieces: Iterable[Piece],
    *,
    max_new: int | None = None,
    is_text: Callable[[str], bool] = lambda symbols: True,
) -> Extension:
    """Add pieces, in their order, to the dictionary of a `tokenizer.json`, which is changed in place.

    Args:
        max_new: most new tokens; a piece that would need more is left out.
        is_text: whether symbols spell whole characters (in a byte-level model they may not).

    Raises:
        UsageError: a kind that cannot be widened, or a vocabulary with holes that cannot be filled.
    """
    check_kind(tokenizer)
    model = tokenizer["model"]
    first_id = _first_free(tokenizer)
    _give_added_tokens_a_place(tokenizer, first_id)
    extension = Extension(tokenizer, first_id)
    if model["type"] == "BPE":
        _extend_bpe(model, pieces, extension, max_new, is_text)
    else:
        _extend_unigram(model, pieces, extension, max_new)
    return extension


def _first_free(tokenizer: dict[str, Any]) -> int:
    vocab = tokenizer["model"]["vocab"]
    last = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    return 1 + max([last, *(token["id"] for token in tokenizer["added_tokens"])])


def _give_added_tokens_a_place(tokenizer: dict[str, Any], first_id: int) -> None:
    """Enter tokens that were added behind the vocabulary into it, at their ids.

    The file states their ids, but `tokenizers` does not read them: it numbers what the vocabulary lacks from
    the vocabulary's end, which is about to move. Entered, they are found. No merge and no score makes the
    model itself spell them: they are cut out of a text before it sees them.
    """
    model = tokenizer["model"]
    if isinstance(model["vocab"], dict):
        for token in tokenizer["added_tokens"]:
            model["vocab"].setdefault(token["content"], token["id"])
        return
    names = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    lowest = _lowest(model["vocab"])
    for number in range(len(model["vocab"]), first_id):
        if number not in names:
            raise UsageError(
                f"the tokenizer has no token with the id {number}", "its vocabulary cannot be widened"
            )
        model["vocab"].append([names[number], lowest])


# -- BPE ---------------------------------------------------------------------------------------------------


class Merges:
    """Byte-pair encoding over ranked merges: the lowest rank first, of equal ones the leftmost."""

    def __init__(self, merges: Iterable[Sequence[str]]):
        self.ranks: dict[tuple[str, str], int] = {(a, b): rank for rank, (a, b) in enumerate(merges)}

    def cut(self, symbols: str) -> list[str]:
        """The tokens of a word, each character of which is in the vocabulary."""
        parts = list(symbols)
        while True:
            found = [
                (rank, place)
                for place in range(len(parts) - 1)
                if (rank := self.ranks.get((parts[place], parts[place + 1]))) is not None
            ]
            if not found:
                return parts
            place = min(found)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]


def _extend_bpe(
    model: dict[str, Any],
    pieces: Iterable[Piece],
    extension: Extension,
    max_new: int | None,
    is_text: Callable[[str], bool],
) -> None:
    """`ignore_merges` (Llama 3) takes a whole word from the vocabulary without merging. The merges are added
    all the same: most words stand inside longer ones, where only merges find them."""
    vocab, merges = model["vocab"], model["merges"]
    old = frozenset(vocab)
    bpe = Merges(merges)
    for piece in pieces:
        found = _merges_for(piece.symbols, bpe, vocab, old, is_text)
        if found is None:
            extension.left_out[KNOWN_OTHERWISE] += 1
            continue
        symbols, pairs = found
        if max_new is not None and len(extension.ids) + len(symbols) > max_new:
            extension.left_out[OVER_LIMIT] += 1
            _forget(bpe, pairs)
            continue
        extension.take(piece, symbols)
        vocab.update((one, extension.ids[one]) for one in symbols)
        merges.extend([a, b] for a, b in pairs)


def _merges_for(
    symbols: str,
    bpe: Merges,
    vocab: dict[str, int],
    old: frozenset[str],
    is_text: Callable[[str], bool],
) -> tuple[list[str], list[tuple[str, str]]] | None:
    """What makes one token of a word: new vocabulary entries and the merges, which `bpe` already has.

    A character that the base writes in bytes gets an entry of its own first. Of the pairs that could be
    joined, the first that spells whole characters is, so that steps on the way are characters and words.

    Returns:
        None where every pair spells an old token: such a merge would change texts without a new token.
    """
    new = [one for one in dict.fromkeys(symbols) if one not in vocab]
    pairs: list[tuple[str, str]] = []
    while len(parts := bpe.cut(symbols)) > 1:
        joined = [(a, b) for a, b in pairwise(parts) if a + b not in old]
        if not joined:
            _forget(bpe, pairs)
            return None
        pair = next((pair for pair in joined if is_text("".join(pair))), joined[0])
        bpe.ranks[pair] = len(bpe.ranks)
        pairs.append(pair)
        if "".join(pair) not in vocab and "".join(pair) not in new:
            new.append("".join(pair))
    return new, pairs


def _forget(bpe: Merges, pairs: Iterable[tuple[str, str]]) -> None:
    for pair in pairs:
        del bpe.ranks[pair]


# -- Unigram -----------------------------------------------------------------------------------------------


def _extend_unigram(
    model: dict[str, Any], pieces: Iterable[Piece], extension: Extension, max_new: int | None
) -> None:
    vocab = model["vocab"]
    scores: dict[str, float] = dict(vocab)
    for piece in pieces:
        if piece.symbols in scores:
            extension.left_out[KNOWN_OTHERWISE] += 1
        elif max_new is not None and len(extension.ids) >= max_new:
            extension.left_out[OVER_LIMIT] += 1
        else:
            extension.take(piece, [piece.symbols])
    lowest = _lowest(vocab)
    # Short ones first: what a piece has to beat is made of shorter pieces, old and new.
    for symbols in sorted(extension.ids, key=lambda one: (len(one), one)):
        scores[symbols] = max(best_score(symbols, scores, lowest - _UNKNOWN_PENALTY) + _BETTER, lowest)
    vocab.extend([symbols, scores[symbols]] for symbols in extension.ids)


def best_score(symbols: str, scores: dict[str, float], unknown: float) -> float:
    """The score of the best way to cut a word into pieces; a character without a piece costs `unknown`."""
    best = [0.0] + [float("-inf")] * len(symbols)
    for start in range(len(symbols)):
        for end in range(start + 1, len(symbols) + 1):
            score = scores.get(symbols[start:end])
            if score is None and end == start + 1:
                score = unknown
            if score is not None:
                best[end] = max(best[end], best[start] + score)
    return best[-1]


def _lowest(vocab: Sequence[Sequence[Any]]) -> float:
    return min((score for _, score in vocab), default=0.0)
