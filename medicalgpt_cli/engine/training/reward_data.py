"""The data of a reward model: pairs read, audited, split by prompt, rendered to tokens, counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.answer_targets import tool_notes
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import render_answer
from medicalgpt_cli.engine.data.formats import load_prompts
from medicalgpt_cli.engine.data.mixing import check_weights, parse_source, shares_of
from medicalgpt_cli.engine.data.packing import Mix, mixed_items
from medicalgpt_cli.engine.data.preferences import (
    Pair,
    audit,
    audit_notices,
    load_pairs,
    prompt_hash,
    usable_pairs,
)
from medicalgpt_cli.engine.data.reading import counts_for
from medicalgpt_cli.engine.data.rendering import encode_prompt
from medicalgpt_cli.engine.data.report import histogram, percentiles
from medicalgpt_cli.engine.data.splitting import hold_out, without_held_out
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import RewardSettings


@dataclass(frozen=True)
class RenderedPair:
    """Both answers behind their prompt, as token ids that end with the end of the answer's turn."""

    chosen: list[int]
    rejected: list[int]
    margin: float
    longer_chosen: bool | None  # by characters; None where both are equally long
    source: str
    prompt: str  # its hash: pairs of one prompt are alike

    @property
    def shared(self) -> int:
        """How many tokens both rows begin with: the prompt, and what both answers begin with; not the last one."""
        both = zip(self.chosen[:-1], self.rejected[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], both))


PairLayout = Callable[[Sequence[RenderedPair]], dict[str, torch.Tensor]]


class PairDataset(Dataset):
    def __init__(self, pairs: Sequence[RenderedPair]):
        self.pairs = pairs
        self.lengths = [len(pair.chosen) + len(pair.rejected) for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> RenderedPair:
        return self.pairs[index]


@dataclass(frozen=True)
class RewardData:
    training: list[RenderedPair]
    held_out: list[RenderedPair]
    prompts: list[str]  # hashes of the prompts that are trained on
    report: dict[str, Any]
    fingerprints: dict[str, str]
    mix: Mix  # what an epoch takes of each source


def load_reward_data(
    settings: RewardSettings, tokenizer: PreTrainedTokenizerBase, observer: Observer
) -> RewardData:
    """Read `--train-data` and what is held out. No prompt stands on both sides.

    Raises:
        DataError: a row is no pair, or nothing is left to train on.
        UsageError: some sources have a weight and others none.
    """
    sources = [parse_source(text) for text in settings.train_data]
    check_weights(sources)
    names = [one.name for one in sources]
    counts = counts_for(settings, [*names, *settings.eval_data, *settings.exclude_prompts])
    held_counts = counts.fresh()
    options = {"margin_column": settings.margin_column}
    usable = partial(usable_pairs, rules=counts, margin_column=settings.margin_column)
    shares = shares_of(settings.max_samples, sources, usable, counts.notices)
    training = load_pairs(names, counts, observer, shares=shares, **options)
    if settings.eval_data:
        held = load_pairs(settings.eval_data, held_counts, observer, **options)
        training = without_held_out(training, held, counts)
    else:
        training, held = hold_out(training, settings.eval_fraction, settings.seed, counts, observer)
        held_counts.read, held_counts.formats = len(held), counts.formats
        counts.read -= len(held)
    if settings.exclude_prompts:
        excluded = load_prompts(settings.exclude_prompts, counts.fresh(), observer)
        training = without_held_out(training, excluded, counts, "its prompt stands in --exclude-prompts")
    audits = {"training": audit(training), "held_out": audit(held)}
    kept = _rendered(training, tokenizer, settings, counts)
    kept_held = _rendered(held, tokenizer, settings, held_counts)
    if not kept:
        raise DataError("no pair is left to train on", "the counts above say why; --dry-run shows them")
    counts.notices += audit_notices(audits["training"])
    if held:
        held_counts.notices += audit_notices(audits["held_out"])
    trained = {pair.at for pair, _ in kept}
    mix = mixed_items(
        sources, [one for _, one in kept], [len(one.chosen) + len(one.rejected) for _, one in kept], "pairs"
    )
    return RewardData(
        [one for _, one in kept],
        [one for _, one in kept_held],
        sorted({prompt_hash(pair.messages) for pair in training if pair.at in trained}),
        {
            "training": _describe(kept, counts, settings) | {"audit": audits["training"]},
            "held_out": _describe(kept_held, held_counts, settings) | {"audit": audits["held_out"]},
            "sources": mix.told,
        },
        {"training": _fingerprint(kept), "held_out": _fingerprint(kept_held)},
        mix,
    )


def _rendered(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, settings: RewardSettings, counts: Counts
) -> list[tuple[Pair, RenderedPair]]:
    rendered = ((pair, render_pair(tokenizer, pair, settings.max_length, counts)) for pair in pairs)
    return [(pair, one) for pair, one in rendered if one is not None]


def render_pair(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, max_length: int, counts: Counts
) -> RenderedPair | None:
    """Both answers behind the same prompt, its oldest exchanges dropped until the longer answer fits.

    None where nothing can be judged; what was left out or shortened is counted.

    Raises:
        UsageError: the tokenizer has no chat template.
    """

    def render(answer: str, budget: int) -> tuple[list[int], list[int]] | None:
        return render_answer(tokenizer, pair.messages, answer, budget, pair.tools)

    try:
        chosen, rejected = render(pair.chosen, max_length), render(pair.rejected, max_length)
        if chosen and rejected and chosen[0] != rejected[0]:  # shortened for the longer answer only
            ahead = len(chosen[1]) - len(rejected[1])
            if ahead > 0:
                rejected = render(pair.rejected, max_length - ahead)
            else:
                chosen = render(pair.chosen, max_length + ahead)
    except UsageError as problem:
        if not tokenizer.chat_template:
            raise
        counts.add_skip(problem.message, pair.at)
        return None
    if chosen is None or rejected is None:
        counts.add_skip("longer than --max-length", pair.at)
        return None
    if chosen == rejected:
        counts.add_skip("both answers are the same behind the chat template", pair.at)
        return None
    if sum(one["role"] == "user" for one in pair.messages) > 1:  # else there is nothing to drop
        lost = len(encode_prompt(tokenizer, pair.messages, pair.tools)) - len(chosen[0])
        if lost:
            counts.add_truncation("oldest exchanges dropped to fit --max-length", pair.at, lost)
    for note in tool_notes(tokenizer, pair.messages, pair.tools):
        counts.add_merge(note, pair.at)
    longer = None if len(pair.chosen) == len(pair.rejected) else len(pair.chosen) > len(pair.rejected)
    return RenderedPair(
        chosen[0] + chosen[1],
        rejected[0] + rejected[1],
        pair.margin or 0.0,
        longer,
        pair.source,
        prompt_hash(pair.messages),
    )


def _describe(
    pairs: Sequence[tuple[Pair, RenderedPair]], counts: Counts, settings: RewardSettings
) -> dict[str, Any]:
    lengths = sorted(len(side) for _, one in pairs for side in (one.chosen, one.rejected))
    return {
        **counts.as_dict(),
        "pairs": len(pairs),
        "tokens": sum(lengths),
        "max_length": settings.max_length,
        "lengths": percentiles(lengths),
        "histogram": histogram(lengths),
    }


def _fingerprint(pairs: Sequence[tuple[Pair, RenderedPair]]) -> str:
    digest = hashlib.sha256()
    for _, one in pairs:
        digest.update(repr((one.chosen, one.rejected, one.margin)).encode())
    return digest.hexdigest()


# -- batches -----------------------------------------------------------------------------------------------


def laid_end_to_end(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Token rows without padding: input_ids and position_ids (1, total); ends (rows,); cu_seq_lens (rows + 1,)."""
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[place for row in rows for place in range(len(row))]]),
        "ends": bounds[1:] - 1,
        "cu_seq_lens_q": bounds.to(torch.int32),
        "cu_seq_lens_k": bounds.to(torch.int32),
    }


def padded_right(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Token rows padded on the right: input_ids and attention_mask (rows, longest); ends (rows,)."""
    longest = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "ends": torch.tensor([index * longest + len(row) - 1 for index, row in enumerate(rows)]),
    }


def behind_their_prompts(pairs: Sequence[RenderedPair]) -> dict[str, torch.Tensor]:
    """Pairs without padding, with what both answers of a pair begin with laid down once.

    A pair is its chosen row, and then the rest of its rejected one, which borrows the beginning.

    Returns:
        input_ids and position_ids (1, total); ends (2 · pairs,), all chosen answers first; cu_seq_lens
        (rows + 1,); prefixes (rows, 2) for `padding_free_attention`.
    """
    rows: list[Sequence[int]] = []
    starts: list[int] = []  # the position of each row's first token
    prefixes: list[tuple[int, int]] = []
    laid = 0
    for pair in pairs:
        shared = pair.shared
        rows += [pair.chosen, pair.rejected[shared:]]
        starts += [0, shared]
        prefixes += [(0, 0), (laid, laid + shared)]
        laid += len(pair.chosen) + len(pair.rejected) - shared
    batch = laid_end_to_end(rows)
    positions = [place + start for row, start in zip(rows, starts, strict=True) for place in range(len(row))]
    return {
        **batch,
        "position_ids": torch.tensor([positions]),
        "ends": torch.cat([batch["ends"][0::2], batch["ends"][1::2]]),
        "prefixes": torch.tensor(prefixes),
    }


def each_by_itself(
    pairs: Sequence[RenderedPair], lay: Callable[[Sequence[Sequence[int]]], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Pairs as `lay` lays rows: all chosen ones, then all rejected ones."""
    return lay([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])


def pair_layout(model: Any, padding_free: bool, pad_id: int) -> PairLayout:
    """How `model` is given pairs: their prompts once where it can, end to end, or padded."""
    if padding_free and attention.borrows_prefixes(model):
        return behind_their_prompts
    return partial(
        each_by_itself, lay=laid_end_to_end if padding_free else partial(padded_right, pad_id=pad_id)
    )


def pair_batch(pairs: Sequence[RenderedPair], lay: PairLayout) -> dict[str, torch.Tensor]:
    """Both answers of every pair for one forward pass; `labels` counts the pairs."""
    return {
        **lay(pairs),
        "margins": torch.tensor([pair.margin for pair in pairs]),
        "labels": torch.ones(len(pairs), dtype=torch.long),
    }
