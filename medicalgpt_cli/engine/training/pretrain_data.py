"""The data of a pretraining run: sources tokenised on disk, split, packed, mixed, counted."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.corpus import (
    Corpus,
    choose_held_out,
    measured_order,
    tokenise,
)
from medicalgpt_cli.engine.data.examples import IGNORED
from medicalgpt_cli.engine.data.mixing import Source, check_weights, parse_source, share_out, shares_notice
from medicalgpt_cli.engine.data.packing import (
    AllBlocks,
    HeldOut,
    MixingSampler,
    PackedBlocks,
    held_out_windows,
    quotas,
)
from medicalgpt_cli.engine.data.readers import check_text_unit
from medicalgpt_cli.engine.data.reading import counts_for
from medicalgpt_cli.engine.data.rendering import document_marks
from medicalgpt_cli.engine.data.report import histogram, merged_counts, percentiles
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.environment import cache_folder
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.settings.stages import PretrainSettings


@dataclass(frozen=True)
class PretrainData:
    blocks: AllBlocks
    sampler: MixingSampler
    held_out: HeldOut
    report: dict[str, Any]  # training, held_out, sources: counts for the screen and run.json
    fingerprints: dict[str, str]
    temporary: ExitStack  # holds the token files of a dry run


def load_pretrain_data(
    settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase, observer: Observer
) -> PretrainData:
    """Tokenise every source (once: the cache keeps it), hold documents out, pack the others into blocks.

    Raises:
        DataError: a source is missing, broken or empty, or nothing is left to train on.
        UsageError: some sources have a weight and others none.
    """
    sources = [parse_source(text) for text in settings.train_data]
    sources += [parse_source(text, replay=True) for text in settings.replay_data]
    held_sources = [Source(name) for name in settings.eval_data]
    check_weights(sources)
    names = [one.name for one in sources + held_sources]
    check_text_unit(names, settings.text_unit)
    rules = counts_for(settings, names)
    start, end, separate = document_marks(tokenizer)
    temporary = ExitStack()
    cache = cache_folder()
    if settings.dry_run:  # which writes nothing that stays
        cache = Path(temporary.enter_context(tempfile.TemporaryDirectory()))

    def read(source: Source) -> Corpus:
        return tokenise(source, tokenizer, settings.text_unit, cache, observer, rules)

    corpora, held_corpora = [read(one) for one in sources], [read(one) for one in held_sources]
    chosen, skipped, shared = _choose(settings, corpora, held_corpora)
    if held_corpora:
        held = [(corpus, np.ones(len(corpus), dtype=bool)) for corpus in held_corpora]
    else:
        held = [
            (corpus, choose_held_out(corpus, settings.eval_fraction, settings.seed)) for corpus in corpora
        ]
    packed = [
        PackedBlocks(corpus, numbers, settings.block_size, start, end)
        for corpus, numbers in zip(corpora, chosen, strict=True)
    ]
    for source, blocks in zip(sources, packed, strict=True):
        if not len(blocks):
            raise DataError(f"{source.name}: no document is left to train on", _why_none(settings))
    drawn = quotas(
        [len(one) for one in packed],
        [one.weight for one in sources],
        [one.replay for one in sources],
        settings.replay_share,
    )
    measured, left_out = HeldOut([], {}), 0
    for corpus, which in held:
        order = measured_order(corpus, which, settings.seed)
        part, out = held_out_windows(
            corpus,
            order,
            settings.block_size,
            settings.eval_tokens,
            separate,
            tokenizer.decode,
            len(start),
        )
        measured.windows += part.windows
        for group, size in part.bytes.items():
            measured.bytes[group] = measured.bytes.get(group, 0) + size
        left_out += out
    report = {
        "training": _training_report(settings, corpora, chosen, packed, drawn, skipped, shared),
        "held_out": _held_out_report(held, measured, left_out, bool(held_corpora)),
        "sources": [
            {
                "source": corpus.source.name,
                "replay": corpus.source.replay,
                "documents": len(numbers),
                "tokens": blocks.tokens,
                "blocks": len(blocks),
                "share": quota / sum(drawn),
                "passes_an_epoch": quota / len(blocks),
            }
            for corpus, numbers, blocks, quota in zip(corpora, chosen, packed, drawn, strict=True)
        ],
        "end_of_text": tokenizer.convert_ids_to_tokens(end),
    }
    return PretrainData(
        AllBlocks(packed),
        MixingSampler([len(one) for one in packed], drawn, settings.seed),
        measured,
        report,
        {
            "training": _fingerprint(settings, corpora, chosen),
            "held_out": _fingerprint(
                settings, [one for one, _ in held], [np.flatnonzero(w) for _, w in held]
            ),
        },
        temporary,
    )


def _choose(
    settings: PretrainSettings, corpora: Sequence[Corpus], held_corpora: Sequence[Corpus]
) -> tuple[list[np.ndarray], Counter[str], list[str]]:
    """The numbers of the documents to train on, by source, why others are not among them, and notices."""
    skipped: Counter[str] = Counter()
    chosen, notices = [], []
    held = np.concatenate([one.hashes for one in held_corpora]) if held_corpora else None
    for corpus in corpora:
        if held is not None:
            out = np.isin(corpus.hashes, held)
            if out.any():
                skipped["stands in the held-out data"] += int(out.sum())
        else:
            out = choose_held_out(corpus, settings.eval_fraction, settings.seed)
        chosen.append(np.flatnonzero(~out))
    ours = [place for place, corpus in enumerate(corpora) if not corpus.source.replay]
    sizes = [len(chosen[place]) for place in ours]
    if settings.max_samples is not None and sum(sizes) > settings.max_samples:
        shares = share_out(
            settings.max_samples, sizes, [corpora[place].source.weight or 1.0 for place in ours]
        )
        skipped[f"behind --max-samples {settings.max_samples}"] = sum(sizes) - settings.max_samples
        for place, share in zip(ours, shares, strict=True):
            chosen[place] = chosen[place][:share]
        if len(ours) > 1:
            names = [corpora[place].source.name for place in ours]
            notices.append(shares_notice(settings.max_samples, names, shares))
    return chosen, skipped, notices


def _why_none(settings: PretrainSettings) -> str:
    if settings.max_samples is not None:
        return "--max-samples is shared over the sources: raise it"
    return "all of them stand in the held-out data"


def _training_report(
    settings: PretrainSettings,
    corpora: Sequence[Corpus],
    chosen: Sequence[np.ndarray],
    packed: Sequence[PackedBlocks],
    drawn: Sequence[int],
    skipped: Counter[str],
    shared: Sequence[str],
) -> dict[str, Any]:
    lengths = np.concatenate([c.ends[n] - c.starts[n] for c, n in zip(corpora, chosen, strict=True)])
    repeated = sum(len(corpus) - len(np.unique(corpus.hashes)) for corpus in corpora)
    short = [(c.source.name, one.tail) for c, one in zip(corpora, packed, strict=True) if one.tail]
    merged = _merged_counts(corpora)
    used = sum(map(len, chosen))
    held_out = sum(map(len, corpora)) - used - sum(skipped.values())
    merged |= {"read": merged["read"] - held_out, "used": used}
    for reason, number in skipped.items():
        merged["skipped"][reason] = number
    notices = [*merged["notices"], *shared]
    if repeated:
        notices.append(f"{repeated:,} of {sum(map(len, corpora)):,} documents repeat another one")
    notices += [f"the last block of {name} is shorter: {tail:,} tokens" for name, tail in short]
    return {
        **merged,
        "notices": notices,
        "documents": sum(map(len, chosen)),
        "tokens": sum(one.tokens for one in packed),
        "blocks": sum(drawn),
        "max_length": settings.block_size,
        "lengths": percentiles(sorted(lengths.tolist())),
        "histogram": histogram(lengths.tolist()),
    }


def _held_out_report(
    held: Sequence[tuple[Corpus, np.ndarray]], measured: HeldOut, left_out: int, own_files: bool
) -> dict[str, Any]:
    tokens = sum(one != IGNORED for window in measured.windows for one in window.block.targets)
    notices = []
    if left_out:
        notices.append(
            f"measured on {tokens:,} of {tokens + left_out:,} held-out tokens (--eval-tokens a source)"
        )
    counts = _merged_counts([corpus for corpus, _ in held]) if own_files else {}
    documents = sum(int(which.sum()) for _, which in held)
    return {
        **counts,
        "read": counts.get("read", documents),
        "used": counts.get("used", documents),
        "notices": [*counts.get("notices", []), *notices],
        "documents": documents,
        "tokens": tokens,
    }


def _merged_counts(corpora: Sequence[Corpus]) -> dict[str, Any]:
    """The counts of several sources as one."""
    return merged_counts([corpus.counts for corpus in corpora])


def _fingerprint(settings: PretrainSettings, corpora: Sequence[Corpus], chosen: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps([settings.block_size, len(corpora)]).encode())
    for corpus, numbers in zip(corpora, chosen, strict=True):
        digest.update(corpus.meta["sha256"].encode())
        digest.update(numbers.astype("<i8").tobytes())
    return digest.hexdigest()
