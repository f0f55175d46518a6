"""`medgpt vocabulary`: words of a corpus become tokens of a model, and all its other tokens stay what they are."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.formats import iterate_texts
from medicalgpt_cli.engine.data.messages import Document
from medicalgpt_cli.engine.data.readers import check_text_unit, expand_sources
from medicalgpt_cli.engine.data.reading import counts_for
from medicalgpt_cli.engine.model.loading import (
    DTYPES,
    load_base,
    load_tokenizer,
    must_be_loadable_alone,
    read_tokenizer,
)
from medicalgpt_cli.engine.model.merging import check_output, task
from medicalgpt_cli.engine.model.references import ModelReference, ResolvedModel, resolve_models
from medicalgpt_cli.engine.model.tokenizer import fingerprint, save_tokenizer
from medicalgpt_cli.engine.model.vocabulary_check import compare, gained_terms, read_terms
from medicalgpt_cli.engine.model.vocabulary_merge import Extension, Piece, check_kind, extend_tokenizer
from medicalgpt_cli.engine.model.vocabulary_pieces import (
    Corpus,
    Spelling,
    candidates,
    count_pieces,
    measure,
    read_sentencepiece,
    train_sentencepiece,
)
from medicalgpt_cli.engine.model.vocabulary_record import new_token_ids, sizes_of, write_record
from medicalgpt_cli.engine.model.vocabulary_rows import rows_needed, widen
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import staged
from medicalgpt_cli.errors import DataError, MedgptError, UsageError
from medicalgpt_cli.settings.stages import VocabularySettings

__all__ = ["extend", "new_token_ids"]

_TOP = 20  # words that the report shows


def extend(settings: VocabularySettings, observer: Observer) -> dict[str, Any]:
    """Write the base model with a wider vocabulary as an ordinary model folder.

    Returns:
        What `--json` prints: the folder, counts of tokens and rows, what the new tokens do to the corpus and to
        `--check-data` by language, medical terms that became one token, and what was left out and why.

    Raises:
        UsageError: an existing output, an adapter or a quantised model, a tokenizer that cannot be widened.
        DataError: the corpus cannot be read, or no word of it is worth a token.
        MedgptError: the new tokenizer would lose text; nothing is left on disk.
    """
    resolved = resolve_models(settings)
    output = Path(settings.output_dir or "")
    check_output(output, resolved)
    stored = _stored_dtype(settings, resolved)
    sources = [*settings.train_data, *settings.check_data]
    expand_sources(sources, with_documents=True)  # a missing file is said at once
    check_text_unit(sources, settings.text_unit)
    rules = counts_for(settings, sources)
    terms = read_terms(settings.terms)
    old = load_tokenizer(settings, resolved, observer, plain_template=False)
    _check_tokenizer(old)

    corpus = _measured(settings, rules, observer)
    pieces, sentencepiece, left_out = _words(settings, rules, corpus, old, observer)
    extension, new = _widened(old, pieces, settings.max_new, left_out)
    if not extension.pieces:
        raise DataError("no word of the corpus is worth a token", _why(left_out))
    with task(observer, "comparing"):
        on_corpus = compare(
            _read(settings.train_data, settings, rules, observer), old, new, extension.first_id
        )
        on_check = None
        if settings.check_data:
            on_check = compare(
                _read(settings.check_data, settings, rules, observer), old, new, extension.first_id
            )

    with staged(output) as folder:
        with task(observer, "loading weights"):
            model = load_base(resolved.base, stored, torch.device("cpu"))
        must_be_loadable_alone(model, resolved.base.name)
        _check_model(model, old)
        base_rows = model.get_input_embeddings().weight.shape[0]
        rows = rows_needed(extension.first_id, len(extension.ids), base_rows, settings.pad_to_multiple)
        spelling = Spelling(old.backend_tokenizer)
        widen(model, {number: spelling.ids(one) for one, number in extension.ids.items()}, rows)
        report = {
            "base": resolved.label,
            "dtype": str(stored).removeprefix("torch."),
            "vocabulary": sizes_of(len(old), extension, base_rows, rows),
            "sentencepiece": sentencepiece,
            "left_out": dict(sorted(left_out.items())),
            "corpus": on_corpus,
            "check": on_check,
            "top": _top(extension.pieces),
            "terms": gained_terms(terms, old.backend_tokenizer, new.backend_tokenizer),
        }
        with task(observer, "writing"):
            model.save_pretrained(folder, max_shard_size=settings.shard_size)
            _write_tokenizer(new, folder, extension)
            write_record(folder, settings, corpus, extension, report)
    _warn(report, observer)
    return {"folder": str(output), **report}


# -- what is refused ---------------------------------------------------------------------------------------


def _stored_dtype(settings: VocabularySettings, resolved: ResolvedModel) -> torch.dtype:
    """The number format of the files: the base's own, or fp32 where it states none."""
    if resolved.adapter is not None:
        raise UsageError(
            f"{resolved.adapter.name} is an adapter: its vocabulary is its base's",
            "merge it first: medgpt merge-lora",
        )
    config = _config_of(resolved.base)
    if config.get("quantization_config"):
        raise UsageError(
            f"{resolved.base.name} is a quantised model", "name the full-precision model with --base-model"
        )
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    inner = config.get("text_config") or {}
    stated = config.get("dtype") or config.get("torch_dtype") or inner.get("dtype") or "float32"
    return getattr(torch, str(stated).removeprefix("torch."), torch.float32)


def _config_of(base: ModelReference) -> dict[str, Any]:
    """config.json; nothing for a GGUF file, whose weights become fp32, and for one that cannot be read:
    loading the weights says what is wrong with it."""
    if base.kind == "gguf":
        return {}
    try:
        return PreTrainedConfig.get_config_dict(base.path)[0]
    except (OSError, ValueError):
        return {}


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise UsageError(
            f"a {type(tokenizer).__name__} cannot be widened", "the base model needs a tokenizer.json"
        )
    check_kind(json.loads(tokenizer.backend_tokenizer.to_str()))


def _check_model(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tokenizer.get_vocab().values()) >= rows:
        raise UsageError(
            f"the tokenizer has ids up to {max(tokenizer.get_vocab().values())}, the model only {rows} rows",
            "they do not belong together: check --tokenizer-path and --base-model",
        )


# -- corpus to tokens --------------------------------------------------------------------------------------


def _read(
    sources: Sequence[str], settings: VocabularySettings, rules: Counts, observer: Observer
) -> Iterable[Document]:
    return iterate_texts(sources, rules.fresh(), observer, text_unit=settings.text_unit)


def _measured(settings: VocabularySettings, rules: Counts, observer: Observer) -> Corpus:
    counts = rules.fresh()
    corpus = measure(iterate_texts(settings.train_data, counts, observer, text_unit=settings.text_unit))
    for notice in (*counts.notices, *counts.unused_lines()):
        observer.on_notice(notice)
    for reason, number in counts.skipped.items():
        observer.on_notice(f"skipped: {number:,} ({reason})")
    return corpus


def _words(
    settings: VocabularySettings,
    rules: Counts,
    corpus: Corpus,
    old: PreTrainedTokenizerBase,
    observer: Observer,
) -> tuple[list[Piece], dict[str, Any], Counter[str]]:
    """The words worth a token, what SentencePiece found, and what was left out."""

    def read() -> Iterable[Document]:
        return _read(settings.train_data, settings, rules, observer)

    given = None
    if settings.sentencepiece_model:
        processor, given = read_sentencepiece(settings.sentencepiece_model)
    else:
        with task(observer, "training SentencePiece"):
            processor = train_sentencepiece(settings, read, corpus, observer)
    with task(observer, "counting words"):
        counts = count_pieces(processor, read())
    left_out: Counter[str] = Counter()
    pieces = candidates(counts, Spelling(old.backend_tokenizer), settings.min_count, left_out)
    about = {
        "pieces": processor.get_piece_size(),
        "used": len(counts),
        "given": given,  # SHA-256 of the file
        "algorithm": None if given else settings.algorithm,
    }
    return pieces, about, left_out


def _widened(
    old: PreTrainedTokenizerBase, pieces: list[Piece], max_new: int | None, left_out: Counter[str]
) -> tuple[Extension, PreTrainedTokenizerBase]:
    """The tokenizer with the new tokens, each of which the real library was seen to use."""
    spelling = Spelling(old.backend_tokenizer)
    while True:
        extension = extend_tokenizer(
            json.loads(old.backend_tokenizer.to_str()), pieces, max_new=max_new, is_text=spelling.is_text
        )
        backend = Tokenizer.from_str(json.dumps(extension.tokenizer, ensure_ascii=False))
        widened = Spelling(backend)
        lost = {
            piece.symbols
            for piece in extension.pieces
            if widened.ids(piece.symbols) != [extension.ids.get(piece.symbols)]
        }
        if not lost:
            break
        left_out["not reachable"] += len(lost)
        pieces = [piece for piece in pieces if piece.symbols not in lost]
    left_out.update(extension.left_out)
    new = copy.deepcopy(old)
    backend.encode_special_tokens = old.backend_tokenizer.encode_special_tokens
    new._tokenizer = backend
    return extension, new


# -- files -------------------------------------------------------------------------------------------------


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, extension: Extension) -> None:
    """Write the tokenizer, and read it back as any program would.

    Raises:
        MedgptError: it comes back as another one.
    """
    save_tokenizer(tokenizer, folder)
    for name in {*type(tokenizer).vocab_files_names.values(), "merges.txt", "vocab.json", "tokenizer.model"}:
        if name != "tokenizer.json":  # files of the old vocabulary
            (folder / name).unlink(missing_ok=True)
    read = read_tokenizer(str(folder))
    sample = "".join(piece.text for piece in extension.pieces)
    same = fingerprint(read) == fingerprint(tokenizer) and (
        read(sample, verbose=False)["input_ids"] == tokenizer(sample, verbose=False)["input_ids"]
    )
    if not same:
        raise MedgptError(
            "the new tokenizer's files are read as another tokenizer",
            "nothing was written; please report this with the base's tokenizer files",
        )


# -- the report --------------------------------------------------------------------------------------------


def _top(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    often = sorted(pieces, key=lambda piece: (-piece.count, piece.text))[:_TOP]
    return [
        {"token": piece.text, "count": piece.count, "was": piece.was, "saved": piece.saved} for piece in often
    ]


def _why(left_out: Counter[str]) -> str:
    reasons = "; ".join(f"{number:,}: {reason}" for reason, number in left_out.most_common(3))
    return f"a lower --min-count or a larger corpus helps ({reasons or 'it has no words'})"


def _warn(report: dict[str, Any], observer: Observer) -> None:
    for name in ("corpus", "check"):
        if report[name] and (other := report[name]["changed_without_new_token"]):
            observer.on_warning(
                f"{other:,} documents of the {name} data have other tokens than before, and none of them is new"
            )
        if report[name] and (failed := report[name]["not_given_back_before_either"]):
            observer.on_notice(
                f"{failed:,} documents of the {name} data are not given back exactly, by the old tokenizer neither"
            )
