"""What a wider vocabulary does to texts: fewer tokens where it helps, the same ones elsewhere, nothing lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.language import language_of
from medicalgpt_cli.engine.data.messages import Document
from medicalgpt_cli.engine.model.vocabulary_pieces import Spelling
from medicalgpt_cli.errors import DataError, MedgptError, UsageError

_BATCH_CHARACTERS = 500_000  # tokenised together
TERMS = Path(__file__).with_name("medical_terms.txt")


@dataclass
class _Tally:
    """Texts of one language."""

    documents: int = 0
    characters: int = 0
    before: int = 0  # tokens
    after: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "characters": self.characters,
            "tokens_before": self.before,
            "tokens_after": self.after,
            "characters_per_token_before": round(self.characters / max(self.before, 1), 4),
            "characters_per_token_after": round(self.characters / max(self.after, 1), 4),
            "tokens_per_character_before": round(self.before / max(self.characters, 1), 4),
            "tokens_per_character_after": round(self.after / max(self.characters, 1), 4),
        }


@dataclass
class _Comparison:
    languages: dict[str, _Tally] = field(default_factory=dict)
    changed: int = 0  # documents in which a new token appears
    new_tokens: int = 0  # uses of new tokens
    other_without_new: int = 0  # documents without a new token, yet with other tokens: there should be none
    failed_before: int = 0  # documents that the old tokenizer does not give back either


def compare(
    documents: Iterable[Document],
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    first_id: int,
) -> dict[str, Any]:
    """Tokenise texts with both tokenizers, and decode what the new one makes of them.

    Args:
        first_id: the lowest id that is new; all ids from there on are.

    Returns:
        Counts, for the report.

    Raises:
        MedgptError: the new tokenizer loses a text that the old one gives back.
    """
    found = _Comparison()
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        for document, ids_old, ids_new in zip(batch, _encode(old, texts), _encode(new, texts), strict=True):
            _tally(found, document, ids_old, ids_new, first_id)
            if _decode(new, ids_new) != document.text:
                if _decode(old, ids_old) == document.text:
                    raise MedgptError(
                        f"{document.at}: the new tokenizer does not give this text back, the old one does",
                        "nothing was written; please report this with the base's tokenizer",
                    )
                found.failed_before += 1
    total = _Tally()
    for tally in found.languages.values():
        total.documents += tally.documents
        total.characters += tally.characters
        total.before += tally.before
        total.after += tally.after
    return {
        **total.as_dict(),
        "languages": {name: found.languages[name].as_dict() for name in sorted(found.languages)},
        "documents_changed": found.changed,
        "new_tokens_used": found.new_tokens,
        "old_tokens_replaced": total.before - (total.after - found.new_tokens),
        "changed_without_new_token": found.other_without_new,
        "given_back_exactly": total.documents - found.failed_before,
        "not_given_back_before_either": found.failed_before,
    }


def _tally(
    found: _Comparison, document: Document, ids_old: list[int], ids_new: list[int], first_id: int
) -> None:
    tally = found.languages.setdefault(language_of(document.text), _Tally())
    tally.documents += 1
    tally.characters += len(document.text)
    tally.before += len(ids_old)
    tally.after += len(ids_new)
    new = sum(number >= first_id for number in ids_new)
    found.new_tokens += new
    found.changed += new > 0
    found.other_without_new += new == 0 and ids_new != ids_old


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# -- medical terms -----------------------------------------------------------------------------------------


def read_terms(path: Path | None) -> list[str]:
    """The built-in medical terms and those of a file, one a line, without repetitions; # begins a comment.

    Raises:
        UsageError: there is no such file.
        DataError: it is not UTF-8 text.
    """
    if path is not None and not path.is_file():
        raise UsageError(f"--terms {path}: no such file", "name a text file with one term a line")
    try:
        lines = [one.read_text(encoding="utf-8-sig").splitlines() for one in (TERMS, path) if one is not None]
    except UnicodeDecodeError:
        raise DataError(f"--terms {path}: not UTF-8 text", "save it as UTF-8") from None
    stripped = (line.strip() for line in itertools.chain.from_iterable(lines))
    return list(dict.fromkeys(line for line in stripped if line and not line.startswith("#")))


def gained_terms(terms: Sequence[str], old: Tokenizer, new: Tokenizer) -> dict[str, Any]:
    """Which terms are one token now and were several, as they stand inside a text or behind a space."""
    spelling, widened = Spelling(old), Spelling(new)
    gained: list[Mapping[str, Any]] = []
    already = 0
    for term in terms:
        forms = [form for form in (term, f" {term}") if spelling.obstacle(form) is None]
        was = {form: len(spelling.ids(spelling.symbols(form))) for form in forms}
        if 1 in was.values():
            already += 1
            continue
        now = [form for form in forms if len(widened.ids(widened.symbols(form))) == 1]
        if now:
            gained.append({"term": term, "was": min(was[form] for form in now)})
    return {
        "looked_for": len(terms),
        "one_token_before": already,
        "one_token_now": already + len(gained),
        "gained": gained,
    }
