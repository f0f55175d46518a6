"""Which batches a run will make: the largest of them, and how much there is to compute in all."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medicalgpt_cli.engine.planning.rehearsal import Rows

_ENOUGH = 200_000  # examples of a run that are looked at one by one; the rest is like them


@dataclass(frozen=True)
class Item:
    """What an example puts into a batch: rows of tokens, targets, and tokens that two of its rows share."""

    rows: tuple[int, ...]
    targets: int
    shared: int = 0  # laid down once where the model can: the second row borrows them

    @property
    def tokens(self) -> int:
        return sum(self.rows) - self.shared


@dataclass(frozen=True)
class Amount:
    """What a run computes in all."""

    tokens: int
    targets: int
    pairs: int  # of tokens that see each other in attention: the sum of the rows' squared lengths
    examples: int


def rows_of(items: Sequence[Item], padded: bool) -> Rows:
    """The rows of one batch."""
    targets = sum(item.targets for item in items)
    if padded:
        return Rows(tuple(length for item in items for length in item.rows), targets, True)
    lengths, prefixes, laid = [], [], 0
    for item in items:
        for number, length in enumerate(item.rows):
            borrowed = item.shared if number else 0
            lengths.append(length - borrowed)
            prefixes.append((laid, laid + borrowed))
        laid += item.tokens
    borrows = any(item.shared for item in items)
    return Rows(tuple(lengths), targets, False, tuple(prefixes) if borrows else ())


def largest_possible(items: Sequence[Item], batch_size: int, padded: bool) -> Rows:
    """The batch in which the longest examples meet."""
    return rows_of(heapq.nlargest(batch_size, items, key=lambda item: item.tokens), padded)


def over_the_run(
    items: Callable[[int], Item], sampler: Any, examples: int, batch_size: int, processes: int, padded: bool
) -> tuple[Rows, Amount]:
    """The largest batch of the first process and all that is computed, in `examples` draws from `sampler`.

    Args:
        items: an example's item by its index. batch_size: of each process.
    """
    order: list[int] = []
    epoch = 0
    looked = min(examples, _ENOUGH)
    while len(order) < looked:
        sampler.set_epoch(epoch)
        order += list(sampler)
        epoch += 1
    sampler.set_epoch(0)
    order = order[:looked]
    whole = batch_size * processes
    largest, size = None, -1
    tokens = targets = pairs = 0
    for start in range(0, len(order), whole):
        batch = [items(index) for index in order[start : start + whole]]
        tokens += sum(item.tokens for item in batch)
        targets += sum(item.targets for item in batch)
        pairs += sum(length**2 for item in batch for length in item.rows)
        rows = rows_of(batch[::processes], padded)
        if rows.tokens > size:
            largest, size = rows, rows.tokens
    scale = examples / len(order)
    amount = Amount(round(tokens * scale), round(targets * scale), round(pairs * scale), examples)
    return largest, amount
