"""The words of a corpus: a SentencePiece model, how often its pieces are used, and which are worth a token.

The corpus is read as a stream, once for each step. Nothing here writes a file: the corpus may be about patients.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

from medicalgpt_cli.engine.data.messages import Document
from medicalgpt_cli.engine.model.vocabulary_merge import Piece
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import VocabularySettings

TRAINING_CHARACTERS = 20_000_000  # of a larger corpus, SentencePiece is trained on a share
_LINE = 4_000  # characters of a line for SentencePiece, which takes no whole documents
_SPACE = "▁"

Documents = Callable[[], Iterable[Document]]  # opens the corpus anew


@dataclass(frozen=True)
class Corpus:
    """What a corpus is, to tell it from others."""

    documents: int
    characters: int
    sha256: str  # over the SHA-256 of each document's UTF-8 bytes, in order


def measure(documents: Iterable[Document]) -> Corpus:
    """Read the whole corpus once."""
    count = characters = 0
    seen = hashlib.sha256()
    for document in documents:
        count += 1
        characters += len(document.text)
        seen.update(hashlib.sha256(document.text.encode("utf-8")).digest())
    return Corpus(count, characters, seen.hexdigest())


# -- SentencePiece -----------------------------------------------------------------------------------------


def train_sentencepiece(
    settings: VocabularySettings, documents: Documents, corpus: Corpus, observer: Observer
) -> Any:
    """A SentencePiece model of the corpus, or of a share of a large one: the same on every machine.

    Raises:
        UsageError: more different characters than `--size` allows.
        DataError: SentencePiece finds nothing to learn.
    """
    share = min(1.0, TRAINING_CHARACTERS / corpus.characters)
    if share < 1:
        observer.on_notice(
            f"SentencePiece is trained on {share:.1%} of the corpus, chosen by the documents' hashes; "
            "words are counted in all of it"
        )
    content = _train(settings, lambda: _training_lines(documents(), share), settings.size)
    processor = _processor(content)
    found = processor.get_piece_size()
    if found < settings.size:
        observer.on_notice(f"the corpus gives {found:,} SentencePiece pieces, not {settings.size:,}")
    return processor


def _train(settings: VocabularySettings, lines: Callable[[], Iterator[str]], size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=written,
            model_type=settings.algorithm,
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=settings.character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            byte_fallback=False,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            max_sentence_length=8 * _LINE,  # in bytes
            minloglevel=2,
        )
    except RuntimeError as problem:  # its text is not passed on: it may quote the corpus
        if too_high := re.search(r"Vocabulary size too high.*<= (\d+)", str(problem)):
            return _train(settings, lines, int(too_high[1]))
        if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(problem)):
            raise UsageError(
                f"--size {size}: the corpus alone has {too_small[1]} different characters",
                "a larger --size, or a lower --character-coverage",
            ) from None
        if "sentences_.empty()" in str(problem):
            raise DataError("the corpus holds no words", "is it the right file?") from None
        raise DataError(
            "SentencePiece cannot learn from this corpus", "try the other --algorithm; --debug shows more"
        ) from problem
    return written.getvalue()


def read_sentencepiece(path: Path) -> tuple[Any, str]:
    """A SentencePiece model and the SHA-256 of its file.

    Raises:
        UsageError: the file is missing or no SentencePiece model.
    """
    if not path.is_file():
        raise UsageError(f"--sentencepiece-model {path}: no such file", "name a .model file")
    content = path.read_bytes()
    try:
        return _processor(content), hashlib.sha256(content).hexdigest()
    except RuntimeError:
        raise UsageError(
            f"--sentencepiece-model {path}: not a SentencePiece model", "it is usually named *.model"
        ) from None


def _processor(content: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return processor


def _training_lines(documents: Iterable[Document], share: float) -> Iterator[str]:
    limit = int(share * 2**64)
    for document in documents:
        digest = hashlib.blake2b(document.text.encode("utf-8"), digest_size=8).digest()
        if share >= 1 or int.from_bytes(digest, "big") < limit:
            yield from _lines(document.text)


def _lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for start in range(0, len(line), _LINE):
            if (part := line[start : start + _LINE]).strip():
                yield part


def count_pieces(processor: Any, documents: Iterable[Document]) -> Counter[str]:
    """How often each piece of the SentencePiece model is used in the corpus, as text."""
    used: Counter[int] = Counter()
    for document in documents:
        for line in _lines(document.text):
            used.update(processor.encode(line))
    found: Counter[str] = Counter()
    for number, count in used.items():
        if not (processor.is_control(number) or processor.is_unknown(number) or processor.is_byte(number)):
            found[processor.id_to_piece(number).replace(_SPACE, " ")] += count
    return found


# -- what is worth a token ---------------------------------------------------------------------------------


class Spelling:
    """How a base tokenizer's model sees words: as byte letters, with ▁ for spaces, or as they are."""

    def __init__(self, backend: Tokenizer):
        self._normalizer, self._pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        self._model = backend.model
        self._added = [token.content for token in backend.get_added_tokens_decoder().values()]
        self._bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        stated = json.loads(backend.to_str())
        unknown = stated["model"].get("unk_token")
        self._unknown = stated["model"].get("unk_id") if unknown is None else backend.token_to_id(unknown)
        self._byte_level = '"ByteLevel"' in json.dumps([stated["normalizer"], stated["pre_tokenizer"]])
        self._space = self._letters(" ")
        if not self._byte_level and _SPACE in "".join(self._seen("a b")):
            self._space = _SPACE

    def symbols(self, text: str) -> str:
        """What the model sees of a word inside a text."""
        return self._letters(text).replace(" ", self._space)

    def obstacle(self, text: str) -> str | None:
        """Why a word can never be one token; None if it can."""
        if any(token in text for token in self._added):
            return "spells a special token of the base"
        seen = self._seen(text)
        if len(seen) != 1:
            return "crosses a word boundary of the base"
        symbols = self.symbols(text)
        # A tokenizer may put a space in front of a text; inside a text there is none.
        return None if seen[0] in (symbols, self._space + symbols) else "is normalised away by the base"

    def ids(self, symbols: str) -> list[int]:
        """The base's tokens of a word that stands inside a text."""
        return [token.id for token in self._model.tokenize(symbols)]

    def is_lost(self, symbols: str) -> bool:
        """Whether the base has a character of a word only as its unknown token."""
        return self._unknown is not None and self._unknown in self.ids(symbols)

    def is_text(self, symbols: str) -> bool:
        """Whether symbols spell whole characters."""
        return not self._byte_level or "\ufffd" not in decoders.ByteLevel().decode([symbols])

    def _letters(self, text: str) -> str:
        if not self._byte_level:
            return text
        return "".join(part for part, _ in self._bytes.pre_tokenize_str(text))

    def _seen(self, text: str) -> list[str]:
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        if self._pre_tokenizer is None:
            return [text]
        return [part for part, _ in self._pre_tokenizer.pre_tokenize_str(text)]


def candidates(
    counts: Counter[str], spelling: Spelling, min_count: int, left_out: Counter[str]
) -> list[Piece]:
    """The words worth a token, the ones that save most first; the others are counted by reason."""
    found = []
    for text, count in counts.items():
        if count < min_count:
            left_out["rarer than --min-count"] += 1
            continue
        if obstacle := spelling.obstacle(text):
            left_out[obstacle] += 1
            continue
        symbols = spelling.symbols(text)
        lost = spelling.is_lost(symbols)
        was = len(spelling.ids(symbols))
        if lost:  # unknown characters side by side are one token of some bases
            was = max(was, len(symbols))
        if was < 2 and not lost:
            left_out["one token of the base already"] += 1
        else:
            found.append(Piece(text, symbols, count, was))
    return sorted(found, key=lambda piece: (-piece.saved, piece.text))
