"""Documents to blocks of equal length, without losing or repeating a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from medicalgpt_cli.engine.data.corpus import LANGUAGES, Corpus
from medicalgpt_cli.engine.data.examples import IGNORED
from medicalgpt_cli.engine.data.mixing import Source, mix_rows, source_numbers
from medicalgpt_cli.errors import DataError


@dataclass(frozen=True)
class Block:
    """A row of training text.

    `targets[t]` is the token that position t predicts: the next one of the stream, -100 where there is none.
    `starts` are the positions at which documents begin; the first is 0, where perhaps one goes on.
    """

    input_ids: list[int]
    targets: list[int]
    starts: list[int]


class PackedBlocks(Dataset):
    """Chosen documents of a corpus as one stream, cut into blocks.

    The stream is start, document, start, document, … Each token but the very first is predicted exactly
    once: the last position of a block predicts the first token of the next. The last block may be shorter.
    """

    def __init__(self, corpus: Corpus, chosen: np.ndarray, block_size: int, start: Sequence[int], end: int):
        """
        Args:
            chosen: the numbers of the documents, in order.
            start, end: the marks of `document_marks`; where they are one token, it also ends the stream.
        """
        self.corpus, self.block_size = corpus, block_size
        self.start, self.end = tuple(start), end
        self.from_file = corpus.starts[chosen]
        lengths = corpus.ends[chosen] - self.from_file
        self.bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)  # in the stream
        self.tokens = int(self.bounds[-1])

    def __len__(self) -> int:
        return -(-self.tokens // self.block_size)

    @property
    def tail(self) -> int:
        """Tokens of the last block where it is shorter than the others, else 0."""
        return self.tokens % self.block_size

    def __getitem__(self, index: int) -> Block:
        begin = index * self.block_size
        end = min(begin + self.block_size, self.tokens)
        ids = self._stream(begin, min(end + 1, self.tokens))
        following = ids[1:] if len(ids) > end - begin else [*ids[1:], self._behind_the_last]
        # Start tokens are put there, not predicted.
        targets = [IGNORED if self.is_separate and one in self.start else one for one in following]
        first, last = np.searchsorted(self.bounds, [begin, end], side="left")
        starts = [int(bound - begin) for bound in self.bounds[first:last]]
        return Block(ids[: end - begin], targets, starts if starts[:1] == [0] else [0, *starts])

    @property
    def is_separate(self) -> bool:
        """Whether the start of a document and the end of text are marked by different tokens."""
        return self.start != (self.end,)

    @property
    def _behind_the_last(self) -> int:
        return IGNORED if self.is_separate else self.end

    def _stream(self, begin: int, end: int) -> list[int]:
        """Tokens begin … end of the stream."""
        first = int(np.searchsorted(self.bounds, begin, side="right")) - 1
        pieces = []
        while begin < end:
            inside = begin - int(self.bounds[first])
            take = min(end, int(self.bounds[first + 1])) - begin
            at = int(self.from_file[first]) + inside
            pieces.append((at, at + take))
            begin += take
            first += 1
        return self.corpus.read(pieces)


class AllBlocks(Dataset):
    """The blocks of several sources, one source behind the other."""

    def __init__(self, sources: Sequence[PackedBlocks]):
        self.sources = sources
        self.offsets = np.concatenate([[0], np.cumsum([len(one) for one in sources])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> Block:
        source = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return self.sources[source][index - int(self.offsets[source])]


class MixingSampler(Sampler[int]):
    """Each epoch draws a fixed number of blocks from each source and shuffles them together.

    A source goes through its blocks in shuffled passes; where an epoch ends within a pass, the next epoch
    goes on there. All of it follows from seed and epoch, so that a resumed run meets the same order.
    """

    def __init__(self, sizes: Sequence[int], quotas: Sequence[int], seed: int):
        """
        Args:
            sizes: how many blocks each source has.
            quotas: how many of them an epoch takes; more than there are repeats some.
        """
        self.sizes, self.quotas, self.seed = sizes, quotas, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.quotas)

    def __iter__(self) -> Iterator[int]:
        drawn, offset = [], 0
        for number, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            drawn.append(offset + self._take(number, size, self.epoch * quota, quota))
            offset += size
        order = torch.cat(drawn)
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(order[torch.randperm(len(order), generator=shuffle)].tolist())

    def _take(self, source: int, size: int, begin: int, count: int) -> torch.Tensor:
        """Blocks begin … begin + count of a source's endless sequence of shuffled passes."""
        found = []
        while count > 0:
            of_pass, inside = divmod(begin, size)
            generator = torch.Generator().manual_seed((self.seed * 65_537 + source) * 1_000_003 + of_pass)
            piece = torch.randperm(size, generator=generator)[inside : inside + count]
            found.append(piece)
            begin, count = begin + len(piece), count - len(piece)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def quotas(
    blocks: Sequence[int], weights: Sequence[float | None], replay: Sequence[bool], share: float
) -> list[int]:
    """How many blocks of each source make up an epoch.

    Without weights each source is seen once. With weights the epoch is as long, divided by weight. Replay
    sources come on top and make up `share` of the whole, divided among them by size.
    """
    ours = [index for index, is_replay in enumerate(replay) if not is_replay]
    total = sum(blocks[index] for index in ours)
    found = list(blocks)
    if any(weights[index] is not None for index in ours):
        whole = sum(weights[index] or 0.0 for index in ours)
        for index in ours:
            found[index] = max(round(total * (weights[index] or 0.0) / whole), 1)
    general = [index for index, is_replay in enumerate(replay) if is_replay]
    if general:
        wanted = sum(found[index] for index in ours) * share / (1 - share)
        size = sum(blocks[index] for index in general)
        for index in general:
            found[index] = max(round(wanted * blocks[index] / size), 1)
    return found


@dataclass(frozen=True)
class Mix:
    """What an epoch takes of each source.

    rows: what each source has, and how much of it is taken (`mix_rows`).
    """

    sizes: list[int]
    drawn: list[int]
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        """Items that an epoch takes."""
        return sum(self.drawn)

    @property
    def told(self) -> list[dict[str, Any]]:
        """The rows that a report shows: none of a single source."""
        return self.rows if len(self.rows) > 1 else []

    def sampler(self, seed: int) -> MixingSampler | None:
        """None where an epoch takes everything once, so that there is nothing to mix."""
        return None if self.sizes == self.drawn else MixingSampler(self.sizes, self.drawn, seed)


def mix(sources: Sequence[Source], sizes: list[int], tokens: Sequence[int], unit: str) -> Mix:
    """How sources that have so many items are mixed, by their weights.

    Raises:
        DataError: nothing is left of a source that has a weight.
    """
    for source, size in zip(sources, sizes, strict=True):
        if source.weight is not None and not size:
            raise DataError(
                f"{source.name}: nothing is left to train on, and it has a weight",
                "`medgpt data` on it shows what was skipped and why",
            )
    drawn = quotas(sizes, [one.weight for one in sources], [False] * len(sources), 0.0)
    return Mix(sizes, drawn, mix_rows(sources, sizes, tokens, drawn, unit))


class _FromFile(Protocol):
    @property
    def source(self) -> str: ...


def mixed_items(
    sources: Sequence[Source], items: Sequence[_FromFile], tokens: Sequence[int], unit: str
) -> Mix:
    """The same of items that stand in the order of their sources, and name their files.

    Args:
        tokens: how many each item has.
    """
    numbers = source_numbers(sources)
    sizes, sums = [0] * len(sources), [0] * len(sources)
    for item, count in zip(items, tokens, strict=True):
        sizes[numbers[item.source]] += 1
        sums[numbers[item.source]] += count
    return mix(sources, sizes, sums, unit)


# -- held-out text -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A stretch of a held-out document: every token of the document is a target of exactly one window."""

    block: Block
    group: tuple[str, str]  # (source, language)
    document: int  # the hash of the document: windows of one are alike
    size: int  # UTF-8 bytes of the document's text that is measured, at its first window; 0 at the others


@dataclass
class HeldOut:
    """What is measured: windows, and the UTF-8 bytes that the targets of each group spell."""

    windows: list[Window]
    bytes: dict[tuple[str, str], int]


def held_out_windows(
    corpus: Corpus,
    order: np.ndarray,
    block_size: int,
    budget: int,
    separate_end: bool,
    decode: Callable[[list[int]], str],
    start_tokens: int = 1,
) -> tuple[HeldOut, int]:
    """Windows of documents in the order given, until `budget` targets are reached.

    The start tokens in front of a document make its first token a target; a window begins with the last
    token of the one before. Start and end-of-text tokens spell no bytes and are no targets. So the total loss is
    that of the text alone, whatever the vocabulary.

    Args:
        decode: ids to text; used where the budget ends within a document, to count the bytes before it.
        start_tokens: how many stand in front of each document.

    Returns:
        The windows, and how many targets of the chosen documents were left out.
    """
    found = HeldOut([], {})
    left_out = 0
    for number in order:
        begin, end = int(corpus.starts[number]), int(corpus.ends[number]) - separate_end
        targets = end - begin - start_tokens
        group = (corpus.source.name, LANGUAGES[int(corpus.languages[number])])
        take = min(targets, budget)
        left_out += targets - take
        if take <= 0:
            continue
        budget -= take
        ids = corpus.read([(begin, begin + start_tokens + take)])
        text = ids[start_tokens:]
        size = int(corpus.bytes[number]) if take == targets else len(decode(text).encode("utf-8", "replace"))
        found.bytes[group] = found.bytes.get(group, 0) + size
        predicted = [*[IGNORED] * (start_tokens - 1), *text]
        edges = [*range(0, len(predicted), block_size), len(predicted)]
        document = int(corpus.hashes[number])
        found.windows += [
            Window(Block(ids[a:b], predicted[a:b], [0]), group, document, 0 if a else size)
            for a, b in pairwise(edges)
        ]
    found.bytes = dict(sorted(found.bytes.items()))
    return found, left_out
