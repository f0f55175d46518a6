"""How well a reward model tells better answers from worse ones: per file, with intervals, never pooled."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from medicalgpt_cli.engine.evaluation.batched import by_length, in_batches, never
from medicalgpt_cli.engine.evaluation.paired import PerItem, per_answer
from medicalgpt_cli.engine.evaluation.statistics import expected_calibration_error, share_interval
from medicalgpt_cli.engine.observer import Observer

BUCKETS = ("chosen longer", "same length", "chosen shorter")


def score_rows(
    model: torch.nn.Module,
    rows: Sequence[Sequence[int]],
    lay: Callable[[Sequence[Sequence[int]]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = never,
) -> list[float] | None:
    """The score of each token row, whatever it is batched with; None where `should_stop` said so."""
    lengths = [len(row) for row in rows]
    found = _scored(model, rows, lengths, lay, batch_size, "answers", observer, should_stop)
    return None if found is None else [one for (one,) in found]


def score_pairs(
    model: torch.nn.Module,
    pairs: Sequence[Any],
    lay: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = never,
) -> tuple[list[float], list[float]] | None:
    """The scores of all chosen and of all rejected answers; None where `should_stop` said so.

    Args:
        pairs: with `chosen` and `rejected` as token ids. lay: pairs to a batch, all chosen answers first.
    """
    lengths = [len(pair.chosen) + len(pair.rejected) for pair in pairs]
    found = _scored(model, pairs, lengths, lay, batch_size, "pairs", observer, should_stop)
    return None if found is None else ([one for one, _ in found], [other for _, other in found])


def _scored(
    model: torch.nn.Module,
    items: Sequence[Any],
    lengths: Sequence[int],
    lay: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    batch_size: int,
    unit: str,
    observer: Observer | None,
    should_stop: Callable[[], bool],
) -> list[list[float]] | None:
    """The scores of each item; a batch of n items has the first score of each, then the second of each."""
    batches = by_length(lengths, batch_size)
    found = in_batches(
        model,
        items,
        batches,
        lay,
        lambda batch: model(**batch).logits.tolist(),
        task=f"scoring {unit}",
        unit=unit,
        observer=observer,
        should_stop=should_stop,
    )
    if found is None:
        return None
    scores: list[list[float]] = [[] for _ in items]
    for batch, of_batch in zip(batches, found, strict=True):
        for place, index in enumerate(batch):
            scores[index] = of_batch[place :: len(batch)]
    return scores


def judge(
    chosen: Sequence[float],
    rejected: Sequence[float],
    margins: Sequence[float],
    longer: Sequence[bool | None],
    sources: Sequence[str],
    prompts: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Figures of a reward model on held-out pairs.

    Args:
        prompts: what names the prompt of each pair; None where no two pairs have the same.

    Returns:
        loss: mean -ln sigmoid(chosen - rejected - margin). pairs. parts, one a source: pairs, loss, accuracy
        (a tie counts half) with its 95 % interval `low`, `high` (Wilson 1927; where prompts have several pairs the
        bootstrap of whole prompts, None where that has no spread), mean margin of the scores,
        `longer_wins`: the accuracy of taking the longer answer (ties half), calibration_error: expected
        calibration error of p = sigmoid(difference), and accuracy by which answer is longer.
    """
    losses = _losses(chosen, rejected, margins)
    names = list(dict.fromkeys(sources))
    parts = []
    for name in names:
        inside = [index for index, source in enumerate(sources) if source == name]
        parts.append({"source": name, **_part(inside, chosen, rejected, longer, losses, prompts)})
    return {"loss": sum(losses) / max(len(losses), 1), "pairs": len(losses), "parts": parts}


def pair_items(
    chosen: Sequence[float],
    rejected: Sequence[float],
    margins: Sequence[float],
    sources: Sequence[str],
    prompts: Sequence[Hashable],
) -> PerItem:
    """Loss and accuracy pair by pair, for comparing two measurements; accuracy is never pooled over sources."""
    right = [_right(one - other) for one, other in zip(chosen, rejected, strict=True)]
    figures = {"loss": _losses(chosen, rejected, margins), "accuracy": right}
    return per_answer(
        prompts, figures, parts=[{"source": source} for source in sources], by_part=["accuracy"]
    )


def _losses(chosen: Sequence[float], rejected: Sequence[float], margins: Sequence[float]) -> list[float]:
    difference = torch.tensor(chosen) - torch.tensor(rejected) - torch.tensor(list(margins))
    return torch.nn.functional.softplus(-difference.double()).tolist()


def _part(
    inside: Sequence[int],
    chosen: Sequence[float],
    rejected: Sequence[float],
    longer: Sequence[bool | None],
    losses: Sequence[float],
    prompts: Sequence[Hashable] | None,
) -> dict[str, Any]:
    right = {index: _right(chosen[index] - rejected[index]) for index in inside}
    total = sum(right.values())
    asked = None if prompts is None else [prompts[index] for index in inside]
    low, high = share_interval(list(right.values()), asked) or (None, None)
    differences = [chosen[index] - rejected[index] for index in inside]
    by_length = {}
    for bucket, kind in zip(BUCKETS, (True, None, False), strict=True):
        of_kind = [right[index] for index in inside if longer[index] is kind]
        if of_kind:
            by_length[bucket] = {"pairs": len(of_kind), "accuracy": sum(of_kind) / len(of_kind)}
    # Each pair is asked both ways round: p and 1 - p, so that 50 % is what knowing nothing gives.
    chances = torch.sigmoid(torch.tensor(differences).double())
    return {
        "pairs": len(inside),
        "loss": sum(losses[index] for index in inside) / len(inside),
        "accuracy": total / len(inside),
        "low": low,
        "high": high,
        "margin": sum(differences) / len(inside),
        "longer_wins": sum(0.5 if longer[index] is None else float(longer[index]) for index in inside)
        / len(inside),
        "calibration_error": expected_calibration_error(
            [*chances.tolist(), *(1 - chances).tolist()], [1] * len(inside) + [0] * len(inside)
        ),
        "by_length": by_length,
    }


def _right(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
