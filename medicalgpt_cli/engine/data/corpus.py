"""A corpus as token ids on disk: tokenised once, read in pieces, never whole in memory.

<cache>/tokens/<key>/
  tokens.bin      the ids of all documents, one behind the other, each behind its start tokens
  documents.bin   one record a document: where it ends, its bytes, a hash of its text, its language
  meta.json       counts, format, fingerprint
  complete.json   size and SHA-256 of these three, proved whenever the folder is opened

The key covers the files' content, the tokenizer and how a document is cut, so a changed file is read anew.
A folder that does not hold what was written into it is thrown away and written again.
The ids spell the text: the folder is as confidential as the corpus, and only its owner may read it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.formats import iterate_texts
from medicalgpt_cli.engine.data.language import language_of
from medicalgpt_cli.engine.data.messages import Document
from medicalgpt_cli.engine.data.mixing import Source
from medicalgpt_cli.engine.data.readers import HubDataset, expand_sources
from medicalgpt_cli.engine.data.rendering import document_marks, encode_texts
from medicalgpt_cli.engine.data.splitting import held_out, mixed
from medicalgpt_cli.engine.data.token_cache import cached
from medicalgpt_cli.engine.model.tokenizer import fingerprint
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import checkpoints
from medicalgpt_cli.engine.run.files import sha256_file

FORMAT = 2  # counts also how files are read: their encodings, sheets and documents
LANGUAGES = ("zh", "en", "other")
_DOCUMENT = np.dtype([("end", "<i8"), ("bytes", "<i8"), ("hash", "<u8"), ("language", "u1")])
_BATCH_CHARACTERS = 1_000_000  # tokenised together: fast, and little memory
_BATCH_DOCUMENTS = 256


class Corpus:
    """The documents of one source as token ids; opened by `tokenise`."""

    def __init__(self, folder: Path, source: Source):
        self.source = source
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self._tokens = folder / "tokens.bin"
        documents = np.fromfile(folder / "documents.bin", dtype=_DOCUMENT)
        self.ends: np.ndarray = documents["end"].copy()  # (documents,) behind a document's last token
        self.starts: np.ndarray = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)
        self.bytes: np.ndarray = documents["bytes"].copy()  # UTF-8 bytes of the text
        self.hashes: np.ndarray = documents["hash"].copy()
        self.languages: np.ndarray = documents["language"].copy()  # index into LANGUAGES

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def counts(self) -> dict[str, Any]:
        return self.meta["counts"]

    def read(self, pieces: Sequence[tuple[int, int]]) -> list[int]:
        """The ids of some stretches of the file. Mapped for this call only: pages once read are not kept."""
        mapped = np.memmap(self._tokens, dtype=self.meta["dtype"], mode="r")
        found = [mapped[start:end].tolist() for start, end in pieces]
        return list(itertools.chain.from_iterable(found))


def tokenise(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    text_unit: str,
    cache: Path,
    observer: Observer,
    rules: Counts | None = None,
) -> Corpus:
    """Open the corpus of a source, tokenising it if the cache does not have it yet.

    Args:
        rules: counts with the rules by which the source is read.

    Raises:
        DataError: a file is missing or broken, or holds no text.
    """
    rules = rules or Counts()
    files, _ = expand_sources([source.name], with_documents=True)
    return cached(
        cache / "tokens",
        lambda: _key(files, tokenizer, text_unit, rules),
        ("tokens.bin", "documents.bin"),
        source.name,
        files,
        lambda new, key: _write(new, source, tokenizer, text_unit, observer, key, rules),
        lambda folder: Corpus(folder, source),
        observer,
    )


def _key(
    files: Sequence[Path | HubDataset],
    tokenizer: PreTrainedTokenizerBase,
    text_unit: str,
    rules: Counts,
) -> str:
    content = [
        [str(file), sha256_file(file)] if isinstance(file, Path) else [file.name, file.split]
        for file in files
    ]
    reading = rules.reading
    how = [reading.encoding, reading.sheet, reading.columns, rules.strict, sorted(rules.ignore)]
    parts = [FORMAT, fingerprint(tokenizer), document_marks(tokenizer), text_unit, how, content]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _write(
    folder: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    text_unit: str,
    observer: Observer,
    key: str,
    rules: Counts,
) -> None:
    counts, languages, seen = rules.fresh(), Counter(), hashlib.sha256()
    start, _, separate = document_marks(tokenizer)
    end = [document_marks(tokenizer)[1]] if separate else []
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    at = documents = size = 0
    texts = iterate_texts([source.name], counts, observer, text_unit=text_unit)
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "documents.bin").open("wb") as table:
        for batch in _batches(texts):
            records = np.zeros(len(batch), dtype=_DOCUMENT)
            for number, (document, ids) in enumerate(
                zip(batch, encode_texts(tokenizer, [one.text for one in batch]), strict=True)
            ):
                whole = np.asarray([*start, *ids, *end], dtype=dtype)
                tokens.write(whole.tobytes())
                seen.update(whole.tobytes())
                at += len(whole)
                encoded = document.text.encode("utf-8")
                size += len(encoded)
                language = language_of(document.text)
                languages[language] += 1
                records[number] = (at, len(encoded), _hash(document.text), LANGUAGES.index(language))
            table.write(records.tobytes())
            seen.update(records.tobytes())
            documents += len(batch)
    meta = {
        "format": FORMAT,
        "key": key,
        "documents": documents,
        "tokens": at,
        "bytes": size,
        "languages": dict(languages),
        "dtype": dtype.str,
        "sha256": seen.hexdigest(),
        "counts": counts.as_dict(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
    checkpoints.seal(folder)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _hash(text: str) -> int:
    """Equal for texts that differ in spacing only."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


def choose_held_out(corpus: Corpus, fraction: float, seed: int) -> np.ndarray:
    """Which documents are held out: (documents,) of bool. Copies of one text stay on one side."""
    return held_out(corpus.hashes, fraction, seed)


def measured_order(corpus: Corpus, chosen: np.ndarray, seed: int) -> np.ndarray:
    """The numbers of the chosen documents in the order in which they are measured while tokens last."""
    numbers = np.flatnonzero(chosen)
    return numbers[np.argsort(mixed(corpus.hashes[numbers], seed + 1), kind="stable")]
