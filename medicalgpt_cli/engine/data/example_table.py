"""Examples as arrays: in memory where they are few, else in files of which only pieces are read.

A part holds the examples of one source, in the order of its records:

  tokens         the ids of all examples, one behind the other
  examples       a row an example: its length, its stretches, its targets, its conversation, a hash of ids and weights
  stretches      a row a run of tokens with a loss: where it begins and ends in its example, and its weight
  conversations  a row a conversation: file and line, hashes of its question, group and turns
  events         a row a thing that was counted when a conversation was rendered: which, how often, tokens cut
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from medicalgpt_cli.engine.data.examples import IGNORED, Example
from medicalgpt_cli.engine.data.token_cache import META
from medicalgpt_cli.engine.run import checkpoints

EXAMPLE = np.dtype(
    [("length", "<u4"), ("stretches", "<u4"), ("targets", "<u4"), ("conversation", "<u4"), ("digest", "<u8")]
)
STRETCH = np.dtype([("begin", "<u4"), ("end", "<u4"), ("weight", "<f8")])
CONVERSATION = np.dtype(
    [("file", "<u4"), ("line", "<u8"), ("question", "<u8"), ("group", "<u8"), ("content", "<u8")]
)
EVENT = np.dtype([("conversation", "<u4"), ("kind", "<u4"), ("number", "<u4"), ("tokens", "<u8")])
TABLES = {"examples": EXAMPLE, "stretches": STRETCH, "conversations": CONVERSATION, "events": EVENT}


@dataclass
class Chunk:
    """Some conversations and their examples; conversations, files and kinds of events are counted from 0."""

    tokens: np.ndarray
    tables: dict[str, np.ndarray]
    files: list[str] = field(default_factory=list)
    kinds: list[tuple[str, str]] = field(
        default_factory=list
    )  # of events: (skipped, merged or truncated; reason)


def write_chunk(chunk: Chunk, file: IO[bytes]) -> None:
    """Write a chunk for another process: a line of JSON that says what follows, and the bytes of the arrays."""
    arrays = {"tokens": chunk.tokens, **chunk.tables}
    sizes = {name: array.nbytes for name, array in arrays.items()}
    about = {"sizes": sizes, "files": chunk.files, "kinds": chunk.kinds}
    file.write(json.dumps(about).encode() + b"\n")
    for array in arrays.values():
        file.write(array.tobytes())
    file.flush()


def read_chunk(about: Mapping[str, Any], file: IO[bytes], token_type: np.dtype) -> Chunk:
    """What `write_chunk` wrote.

    Args:
        about: its line of JSON.

    Raises:
        EOFError: the bytes end too early.
    """
    arrays = {}
    for name, size in about["sizes"].items():
        raw = file.read(size)
        if len(raw) < size:
            raise EOFError
        kind = TABLES.get(name, token_type)
        arrays[name] = np.frombuffer(bytearray(raw), dtype=kind) if raw else np.zeros(0, dtype=kind)
    tokens = arrays.pop("tokens")
    return Chunk(tokens, arrays, about["files"], [(kind, reason) for kind, reason in about["kinds"]])


def stretches_of(example: Example) -> np.ndarray:
    """The runs of tokens with a loss, as rows of STRETCH."""
    learnt = np.asarray(example.labels) != IGNORED
    weights = np.where(learnt, 1.0 if example.weights is None else np.asarray(example.weights), 0.0)
    edges = np.flatnonzero(np.diff(weights, prepend=0.0, append=0.0))
    found = np.zeros(max(len(edges) - 1, 0), dtype=STRETCH)
    found["begin"], found["end"] = edges[:-1], edges[1:]
    found["weight"] = weights[edges[:-1]]
    return found[found["weight"] > 0]


def targets_of(stretches: np.ndarray) -> int:
    """How many tokens have a loss. The first token of an example is never predicted."""
    return int((stretches["end"] - np.maximum(stretches["begin"], 1)).sum()) if len(stretches) else 0


def digest_of(input_ids: np.ndarray, stretches: np.ndarray) -> int:
    """64 bits that stand for an example: the same tokens with the same losses."""
    digest = hashlib.blake2b(input_ids.astype("<u4").tobytes(), digest_size=8)
    digest.update(stretches.tobytes())
    return int.from_bytes(digest.digest(), "little")


class PartWriter:
    """Takes chunks in order and writes a part, into memory or into the files of a folder."""

    def __init__(self, folder: Path | None):
        self.files: dict[str, int] = {}
        self.kinds: dict[tuple[str, str], int] = {}
        self.arrays: dict[str, list[np.ndarray]] = {name: [] for name in ("tokens", *TABLES)}
        self.handles: dict[str, IO[bytes]] = {}
        self.conversations = 0
        self.folder = folder
        if folder is not None:
            self.handles = {name: (folder / f"{name}.bin").open("wb") for name in self.arrays}

    def add(self, chunk: Chunk) -> None:
        files = np.array([self.files.setdefault(one, len(self.files)) for one in chunk.files], dtype="<u4")
        kinds = np.array([self.kinds.setdefault(one, len(self.kinds)) for one in chunk.kinds], dtype="<u4")
        examples, conversations, events = (
            chunk.tables[one] for one in ("examples", "conversations", "events")
        )
        examples["conversation"] += self.conversations
        events["conversation"] += self.conversations
        conversations["file"] = files[conversations["file"]] if len(files) else 0
        events["kind"] = kinds[events["kind"]] if len(kinds) else 0
        self.conversations += len(conversations)
        for name, array in (("tokens", chunk.tokens), *chunk.tables.items()):
            if self.folder is None:
                self.arrays[name].append(array)
            else:
                self.handles[name].write(array.tobytes())

    def finish(self, dtype: np.dtype, counts: dict[str, Any], **more: Any) -> Part:
        """The part; where it lies in a folder, sealed so that damage is found.

        Args:
            dtype: of the tokens. counts: what happened while the records were read.
        """
        meta = {
            "dtype": dtype.str,
            "files": list(self.files),
            "kinds": [list(one) for one in self.kinds],
            "counts": counts,
            **more,
        }
        if self.folder is not None:
            for handle in self.handles.values():
                handle.close()
            (self.folder / META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
            checkpoints.seal(self.folder)
            return Part.open(self.folder)
        kinds = {"tokens": dtype, **TABLES}
        arrays = {
            name: np.concatenate([np.zeros(0, dtype=kinds[name]), *found])
            for name, found in self.arrays.items()
        }
        return Part(meta, arrays.pop("tokens"), arrays)


class Part:
    """The examples of one source."""

    def __init__(self, meta: dict[str, Any], tokens: np.ndarray | Path, tables: dict[str, np.ndarray]):
        self.meta, self.tokens = meta, tokens
        self.examples, self.stretches = tables["examples"], tables["stretches"]
        self.conversations, self.events = tables["conversations"], tables["events"]
        self.starts = _starts(self.examples["length"])
        self.stretch_starts = _starts(self.examples["stretches"])

    @classmethod
    def open(cls, folder: Path) -> Part:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        tables = {name: np.fromfile(folder / f"{name}.bin", dtype=dtype) for name, dtype in TABLES.items()}
        return cls(meta, folder / "tokens.bin", tables)

    @property
    def counts(self) -> dict[str, Any]:
        """What happened while the records were read (`Counts.as_dict`)."""
        return self.meta["counts"]

    @property
    def is_weighted(self) -> bool:
        return bool((self.stretches["weight"] != 1.0).any())

    def at(self, conversation: int) -> str:
        row = self.conversations[conversation]
        return f"{self.meta['files'][row['file']]}:{row['line']}"

    def example(self, number: int) -> Example:
        begin, end = int(self.starts[number]), int(self.starts[number + 1])
        input_ids = self._read(begin, end)
        labels = [IGNORED] * len(input_ids)
        stretches = self.stretches[self.stretch_starts[number] : self.stretch_starts[number + 1]]
        weights = None if (stretches["weight"] == 1.0).all() else [1.0] * len(input_ids)
        for first, last, weight in stretches.tolist():
            labels[first:last] = input_ids[first:last]
            if weights is not None:
                weights[first:last] = [weight] * (last - first)
        return Example(input_ids, labels, self.at(int(self.examples["conversation"][number])), None, weights)

    def _read(self, begin: int, end: int) -> list[int]:
        """Mapped for this call only: pages of the file that were read are not kept."""
        if isinstance(self.tokens, np.ndarray):
            return self.tokens[begin:end].tolist()
        if begin == end:  # an empty file cannot be mapped
            return []
        return np.memmap(self.tokens, dtype=self.meta["dtype"], mode="r")[begin:end].tolist()


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where pieces of these lengths begin, and behind them where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


class ExampleTable(Sequence[Example]):
    """Chosen examples of several parts, one part behind the other. An example is made when it is asked for."""

    def __init__(self, parts: Sequence[Part], chosen: Sequence[np.ndarray]):
        """
        Args:
            chosen: for each part the numbers of its examples, in order.
        """
        self.parts, self.chosen = parts, chosen
        self.sizes = [len(one) for one in chosen]
        self._bounds = [0, *itertools.accumulate(self.sizes)]

    def __len__(self) -> int:
        return self._bounds[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        place = next(place for place, end in enumerate(self._bounds[1:]) if index < end)
        return self.parts[place].example(int(self.chosen[place][index - self._bounds[place]]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example: (examples,) of int64."""
        return self._column("length").astype(np.int64)

    @property
    def targets(self) -> np.ndarray:
        """Tokens with a loss of each example: (examples,) of int64."""
        return self._column("targets").astype(np.int64)

    @property
    def questions(self) -> list[int]:
        """Which question each example is about, numbered from 0."""
        asked = [
            part.conversations["question"][part.examples["conversation"][numbers]]
            for part, numbers in zip(self.parts, self.chosen, strict=True)
        ]
        _, numbers = np.unique(np.concatenate([np.zeros(0, "<u8"), *asked]), return_inverse=True)
        return numbers.tolist()

    @property
    def is_weighted(self) -> bool:
        """Whether the loss of some tokens is multiplied by something else than 1."""
        return any(part.is_weighted for part in self.parts)

    def tokens_of_parts(self) -> list[int]:
        return [
            int(part.examples["length"][numbers].sum(dtype=np.int64))
            for part, numbers in zip(self.parts, self.chosen, strict=True)
        ]

    def fingerprint(self) -> str:
        """SHA-256 over all examples in order: the same data, rendered the same way."""
        return hashlib.sha256(self._column("digest").astype("<u8").tobytes()).hexdigest()

    def _column(self, name: str) -> np.ndarray:
        columns = (part.examples[name][one] for part, one in zip(self.parts, self.chosen, strict=True))
        return np.concatenate([np.zeros(0, dtype=EXAMPLE[name]), *columns])


def side_counts(parts: Iterable[Part], sides: Iterable[np.ndarray]) -> dict[str, Any]:
    """What was counted when some conversations were rendered, as a part of `Counts.as_dict`.

    Args:
        sides: for each part whether a conversation is meant: (conversations,) of bool.
    """
    found: dict[str, Any] = {"skipped": {}, "merged": {}, "truncated": {}, "tokens_cut": 0, "places": {}}
    for part, side in zip(parts, sides, strict=True):
        events = part.events[side[part.events["conversation"]]]
        found["tokens_cut"] += int(events["tokens"].sum())
        for number, (kind, reason) in enumerate(part.meta["kinds"]):
            of_kind = events[events["kind"] == number]
            if len(of_kind):
                found[kind][reason] = found[kind].get(reason, 0) + int(of_kind["number"].sum())
                places = [part.at(int(one)) for one in of_kind["conversation"][:5]]
                found["places"][reason] = [*found["places"].get(reason, []), *places][:5]
    return found
