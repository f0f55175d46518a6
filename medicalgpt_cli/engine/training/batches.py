"""From examples to batches: which examples meet in a batch, and how they lie in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.data.packing import Block, MixingSampler

IGNORED = -100  # the label of a position without a loss


class ExampleDataset(Dataset):
    """Examples as the trainer wants them: indexable, with a length."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class EpochSampler(Sampler[int]):
    """A shuffle that depends on the seed and the epoch only, so that a resumed run meets the same order.

    With `by_length`, examples of similar length fall into one batch: the shuffled order is cut into windows of
    64 batches, each window is sorted by length and cut into batches, and the batches are shuffled.
    """

    WINDOW = 64

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        by_length: bool,
        draw: MixingSampler | None = None,
    ):
        """
        Args:
            draw: what an epoch takes of each source, in which order; without it, all examples once.
        """
        self.lengths, self.batch_size, self.seed, self.by_length = lengths, batch_size, seed, by_length
        self.draw = draw
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if self.draw is not None:
            self.draw.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.lengths) if self.draw is None else len(self.draw)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.draw is None:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        else:
            order = list(self.draw)
        if not self.by_length:
            return iter(order)
        whole = len(order) - len(order) % self.batch_size  # the short batch stays last
        window = self.WINDOW * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, whole, window):
            piece = sorted(order[start : min(start + window, whole)], key=lambda index: -self.lengths[index])
            batches += [piece[at : at + self.batch_size] for at in range(0, len(piece), self.batch_size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return iter([index for batch in shuffled for index in batches[batch]] + order[whole:])


def _next_token_labels(example: Example) -> list[int]:
    """labels[t] is what position t has to predict: the label of position t + 1."""
    return [*example.labels[1:], IGNORED]


def _next_token_weights(example: Example) -> list[float]:
    """What the loss at each position is multiplied by."""
    if example.weights is None:
        return [1.0] * len(example.labels)
    return [*example.weights[1:], 1.0]


def end_to_end(examples: Sequence[Example], *, weighted: bool = False) -> dict[str, torch.Tensor]:
    """A batch without padding.

    Args:
        weighted: whether the batch says what each loss is multiplied by. Either all batches of a run do, or none.

    Returns:
        input_ids, position_ids, shift_labels, labels and perhaps loss_weights: (1, total);
        cu_seq_lens_q and _k: (examples + 1,).
    """
    input_ids = [token for example in examples for token in example.input_ids]
    positions = [position for example in examples for position in range(len(example.input_ids))]
    labels = [label for example in examples for label in _next_token_labels(example)]
    bounds = [0]
    for example in examples:
        bounds.append(bounds[-1] + len(example.input_ids))
    batch = {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
        "shift_labels": torch.tensor([labels]),
        "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor(bounds, dtype=torch.int32),
    }
    if weighted:
        weights = [weight for example in examples for weight in _next_token_weights(example)]
        batch["loss_weights"] = torch.tensor([weights])
    return batch


def padded(examples: Sequence[Example], pad_id: int, *, weighted: bool = False) -> dict[str, torch.Tensor]:
    """A batch padded on the right, (batch, longest): input_ids, attention_mask, shift_labels and labels.

    Args:
        weighted: whether there are loss_weights, too; as for `end_to_end`.
    """
    longest = max(len(example.input_ids) for example in examples)
    rows: dict[str, list[list[Any]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    if weighted:
        rows["loss_weights"] = []
    for example in examples:
        missing = longest - len(example.input_ids)
        rows["input_ids"].append([*example.input_ids, *[pad_id] * missing])
        rows["attention_mask"].append([1] * len(example.input_ids) + [0] * missing)
        rows["labels"].append([*_next_token_labels(example), *[IGNORED] * missing])
        if weighted:
            rows["loss_weights"].append([*_next_token_weights(example), *[1.0] * missing])
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    return {**batch, "shift_labels": batch["labels"]}


def packed(blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
    """Blocks of documents without padding; each document begins at position 0 and sees itself only.

    Returns:
        input_ids, position_ids, shift_labels and labels: (1, total); cu_seq_lens_q and _k: (documents + 1,).
    """
    input_ids: list[int] = []
    targets: list[int] = []
    bounds: list[int] = []
    for block in blocks:
        bounds += [len(input_ids) + start for start in block.starts]
        input_ids += block.input_ids
        targets += block.targets
    bounds.append(len(input_ids))
    positions = [position for a, b in pairwise(bounds) for position in range(b - a)]
    lengths = torch.tensor(bounds, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([targets]),
        "shift_labels": torch.tensor([targets]),
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
    }


def stacked(blocks: Sequence[Block], pad_id: int) -> dict[str, torch.Tensor]:
    """Blocks as rows, a shorter one padded on the right; the documents of a row see each other."""
    longest = max(len(block.input_ids) for block in blocks)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for block in blocks:
        missing = longest - len(block.input_ids)
        rows["input_ids"].append([*block.input_ids, *[pad_id] * missing])
        rows["attention_mask"].append([1] * len(block.input_ids) + [0] * missing)
        rows["labels"].append([*block.targets, *[IGNORED] * missing])
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    return {**batch, "shift_labels": batch["labels"]}


def target_count(examples: Sequence[Example]) -> int:
    """How many positions have a loss. The first token of an example is never predicted."""
    return sum(label != IGNORED for example in examples for label in example.labels[1:])
