"""`medgpt score`: a file of answers or pairs in, their scores out."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import render_answer
from medicalgpt_cli.engine.data.formats import first_format, load_conversations
from medicalgpt_cli.engine.data.preferences import load_pairs
from medicalgpt_cli.engine.data.reading import counts_for
from medicalgpt_cli.engine.evaluation.preferences import judge, score_pairs, score_rows
from medicalgpt_cli.engine.model.base_record import known_base
from medicalgpt_cli.engine.model.loading import choose_device, choose_dtype, load_tokenizer
from medicalgpt_cli.engine.model.quantization import check_quantization
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.model.reward_model import check_head, load_reward_model
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.planning.weights import must_fit
from medicalgpt_cli.engine.run.files import atomic_write
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.reward_data import (
    RenderedPair,
    laid_end_to_end,
    padded_right,
    pair_layout,
    render_pair,
)
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.groups import ModelSettings
from medicalgpt_cli.settings.stages import ScoreSettings


def score(settings: ScoreSettings, observer: Observer) -> dict[str, Any]:
    """Write one line a row: its id and place, and `score`, or `score_chosen` and `score_rejected` of a pair.

    Returns:
        What `--json` prints: rows, counts of what was left out, and for pairs the figures of `judge`.

    Raises:
        UsageError: no reward model, an untrained head, an existing predictions file.
        DataError: the file is neither pairs nor conversations with an answer, or nothing fits.
    """
    target = settings.predictions_file or "-"
    if target != "-" and Path(target).exists():
        raise UsageError(
            f"--predictions-file {target} exists already", "name a new file; nothing is overwritten"
        )
    named = ModelSettings(
        base_model=settings.reward_model, use_cpu=settings.use_cpu, gpus=settings.gpus, dtype=settings.dtype
    )
    resolved = resolve_models(named)
    check_head(resolved.adapter or resolved.base)
    check_quantization(resolved, settings.quantization)
    tokenizer = load_tokenizer(named, resolved, observer)
    counts = counts_for(settings, [str(settings.data_file)])
    pairs = first_format([str(settings.data_file)], counts.reading) in ("preference", "ranking")
    rows, lines = (_pairs if pairs else _answers)(settings, tokenizer, counts, observer)
    if not rows:
        raise DataError(
            f"{settings.data_file}: no answer fits --max-length {settings.max_length}", "raise it"
        )
    must_fit(settings, resolved, force=settings.force, kind="reward")
    device = choose_device(settings)
    with known_base(resolved, observer, accept=settings.accept_other_base):
        model = load_reward_model(resolved, choose_dtype(settings, device), device, settings.quantization)
    apart = attention.is_exact(model)
    options = {"batch_size": settings.batch_size, "observer": observer}
    report: dict[str, Any] = {"reward_model": resolved.label, "rows": len(lines), "data": counts.as_dict()}
    if pairs:
        lay_pairs = pair_layout(model, apart, tokenizer.pad_token_id)
        with attention.for_batches(model, apart):
            chosen, rejected = score_pairs(model, rows, lay_pairs, **options) or ([], [])
        for line, one, other in zip(lines, chosen, rejected, strict=True):
            line |= {"score_chosen": one, "score_rejected": other}
        report |= judge(
            chosen,
            rejected,
            [0.0] * len(rows),
            [pair.longer_chosen for pair in rows],
            [str(settings.data_file)] * len(rows),
            [pair.prompt for pair in rows],
        )
    else:
        lay = laid_end_to_end if apart else partial(padded_right, pad_id=tokenizer.pad_token_id)
        with attention.for_batches(model, apart):
            scores = score_rows(model, rows, lay, **options) or []
        for line, one in zip(lines, scores, strict=True):
            line["score"] = one
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if target == "-":
        sys.stdout.write(text)
    else:
        atomic_write(target, text)
        report["predictions_file"] = target
    for reason, number in counts.skipped.items():
        observer.on_warning(f"skipped: {number:,} ({reason})")
    return report


def _pairs(
    settings: ScoreSettings, tokenizer: Any, counts: Counts, observer: Observer
) -> tuple[list[RenderedPair], list[dict[str, Any]]]:
    """The pairs as token ids, and a line for each."""
    rows, lines = [], []
    for pair in load_pairs([str(settings.data_file)], counts, observer):
        one = render_pair(tokenizer, pair, settings.max_length, counts)
        if one is not None:
            rows.append(one)
            lines.append({"id": pair.id, "at": pair.at})
    return rows, lines


def _answers(
    settings: ScoreSettings, tokenizer: Any, counts: Counts, observer: Observer
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """The last answer of each conversation, behind what was said before it."""
    rows, lines = [], []
    for conversation in load_conversations([str(settings.data_file)], counts, observer):
        *before, answer = conversation.messages
        ids = render_answer(tokenizer, before, answer, settings.max_length, conversation.tools)
        if ids is None:
            counts.add_skip("longer than --max-length", conversation.at)
            continue
        rows.append(ids[0] + ids[1])
        lines.append({"id": conversation.id, "at": conversation.at})
    return rows, lines
