"""Conversations to a part of examples: rendered in several processes where there are many, kept in the user's cache.

<cache>/examples/<key>/
  tokens.bin, examples.bin, stretches.bin, conversations.bin, events.bin    (`example_table`)
  meta.json       what was counted, and what the numbers in the tables stand for
  complete.json   size and SHA-256 of these, proved whenever the folder is opened

The key covers the files' content, the tokenizer with its template, and the settings that decide how a record is read
and cut. A folder that does not hold what was written into it is thrown away and written again. Of what patients and
doctors say it holds token ids, and hashes of questions and turns; these ids spell the text, so that the folder is as
confidential as the data, and only its owner may read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

import medicalgpt_cli
from medicalgpt_cli import errors
from medicalgpt_cli.engine.data import render_child
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.example_table import (
    CONVERSATION,
    EVENT,
    EXAMPLE,
    STRETCH,
    TABLES,
    Chunk,
    Part,
    PartWriter,
    digest_of,
    read_chunk,
    stretches_of,
    targets_of,
)
from medicalgpt_cli.engine.data.examples import render_conversation
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.readers import COMPRESSIONS, HubDataset, expand_sources
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.engine.data.splitting import group_hash, question_hash
from medicalgpt_cli.engine.data.token_cache import cached
from medicalgpt_cli.engine.model.tokenizer import fingerprint, save_tokenizer
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import sha256_file
from medicalgpt_cli.errors import EnvironmentFailure, MedgptError

FORMAT = 1
SMALL = 16 * 2**20  # bytes of text up to which a source is read anew each time, and nothing of it is written
_PACKED = 8  # times its size that a packed file may unpack to
_CHUNK = 256  # conversations that a process is given at once
_FEW = 4096  # conversations that are rendered before other processes are started


@dataclass(frozen=True)
class Rendering:
    """How conversations become examples."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    thinking: Thinking = "auto"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if len(self.tokenizer) <= 2**16 else "<u4")


def tokenised(
    name: str,
    rendering: Rendering,
    conversations: Iterable[Conversation],
    counts: Counts,
    options: Mapping[str, Any],
    cache: Path,
    observer: Observer,
) -> Part:
    """The examples of a source: from the cache where they stand there, else made, and kept where they are many.

    Args:
        name: a file, a folder or a hub name. conversations: of it; nothing is read where the cache has them.
        counts: what is counted while they are read. options: what they depend on beside the files.

    Raises:
        DataError: a file is missing or broken.
    """
    files, _ = expand_sources([name])
    if _size(files) <= SMALL:
        return _write(None, rendering, conversations, counts)
    return cached(
        cache / "examples",
        lambda: _key(files, rendering, options),
        ("tokens.bin", *(f"{table}.bin" for table in TABLES)),
        name,
        files,
        lambda new, key: _write(new, rendering, conversations, counts, key=key),
        Part.open,
        observer,
    )


def _size(files: Sequence[Path | HubDataset]) -> float:
    """Bytes of text, roughly; a hub data set may have any number."""
    packed = (*COMPRESSIONS, ".parquet", ".xlsx", ".ods")
    size = 0.0
    for file in files:
        if isinstance(file, HubDataset):
            return float("inf")
        size += file.stat().st_size * (_PACKED if file.suffix.lower() in packed else 1)
    return size


def _key(files: Sequence[Path | HubDataset], rendering: Rendering, options: Mapping[str, Any]) -> str:
    content = [
        [str(file), sha256_file(file)] if isinstance(file, Path) else [file.name, file.split]
        for file in files
    ]
    how = [
        FORMAT,
        medicalgpt_cli.__version__,
        fingerprint(rendering.tokenizer),
        rendering.max_length,
        rendering.thinking,
    ]
    parts = [how, sorted(options.items()), content]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _write(
    folder: Path | None,
    rendering: Rendering,
    conversations: Iterable[Conversation],
    counts: Counts,
    **more: Any,
) -> Part:
    writer = PartWriter(folder)
    for chunk in _rendered(conversations, rendering):
        writer.add(chunk)
    return writer.finish(rendering.dtype, counts.as_dict(), **more)


# -- several processes -------------------------------------------------------------------------------------


def _rendered(conversations: Iterable[Conversation], rendering: Rendering) -> Iterator[Chunk]:
    """The chunks of all conversations in order. Of many, the later ones are rendered by other processes."""
    conversations = iter(conversations)
    chunks = iter(lambda: list(islice(conversations, _CHUNK)), [])
    for number, chunk in enumerate(chunks, 1):
        yield render_chunk(chunk, rendering)
        if number * _CHUNK >= _FEW:
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = next(chunks, None)
    if first is None:
        return
    if cores == 1:
        yield render_chunk(first, rendering)
        yield from (render_chunk(chunk, rendering) for chunk in chunks)
        return
    yield from _by_others(chain([first], chunks), rendering, cores)


def _by_others(
    chunks: Iterable[Sequence[Conversation]], rendering: Rendering, processes: int
) -> Iterator[Chunk]:
    """Rendered by `processes` others, each of which has one chunk at a time, so that memory stays bounded."""
    with ExitStack() as open_ones:
        folder = open_ones.enter_context(tempfile.TemporaryDirectory(prefix="medgpt-"))
        save_tokenizer(rendering.tokenizer, Path(folder))
        children = [open_ones.enter_context(_Child(rendering, folder)) for _ in range(processes)]
        busy: deque[_Child] = deque()  # in the order of their chunks
        for chunk in chunks:
            if len(busy) < processes:
                child = children[len(busy)]
            else:
                child = busy.popleft()
                yield child.answer()
            child.ask(chunk)
            busy.append(child)
        while busy:
            yield busy.popleft().answer()


class _Child:
    """A process that renders (`render_child`), with the tokenizer that is saved in a folder."""

    def __init__(self, rendering: Rendering, folder: str):
        package = Path(medicalgpt_cli.__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, "-P", render_child.__file__, str(package)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a foreign error may quote a record
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._said, self._heard = self._process.stdin, self._process.stdout
        self._rendering, self._greeted = rendering, False
        self._tell({"tokenizer": folder, "max_length": rendering.max_length, "thinking": rendering.thinking})

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, conversations: Sequence[Conversation]) -> None:
        self._tell([asdict(one) for one in conversations])

    def answer(self) -> Chunk:
        """
        Raises:
            EnvironmentFailure: the process has ended, or reads the saved tokenizer as another one.
            MedgptError: what rendering raised there.
        """
        if not self._greeted and self._hear()["fingerprint"] != fingerprint(self._rendering.tokenizer):
            raise EnvironmentFailure(
                "the tokenizer is another one after it was saved and read again",
                "a run could not keep it either: is it a tokenizer of Hugging Face's library?",
            )
        self._greeted = True
        about = self._hear()
        if "problem" in about:
            problem = MedgptError.__new__(getattr(errors, about["problem"]))
            MedgptError.__init__(problem, about["message"], about["hint"])
            raise problem
        try:
            return read_chunk(about, self._heard, self._rendering.dtype)
        except EOFError:
            raise self._lost() from None

    def _tell(self, said: Any) -> None:
        try:
            self._said.write(json.dumps(said).encode() + b"\n")
            self._said.flush()
        except BrokenPipeError:
            raise self._lost() from None

    def _hear(self) -> dict[str, Any]:
        line = self._heard.readline()
        if not line.endswith(b"\n"):
            raise self._lost()
        return json.loads(line)

    def _lost(self) -> EnvironmentFailure:
        code = self._process.wait()
        return EnvironmentFailure(
            f"a process that tokenised ended by itself (code {code})",
            "was memory short? `medgpt env` shows it",
        )


def render_chunk(conversations: Sequence[Conversation], rendering: Rendering) -> Chunk:
    """The examples of some conversations, and what was counted on the way."""
    tokens, stretches, examples, table, events = [], [], [], [], []
    files: dict[str, int] = {}
    kinds: dict[tuple[str, str], int] = {}
    for number, conversation in enumerate(conversations):
        counts = Counts()
        for one in render_conversation(
            rendering.tokenizer, conversation, rendering.max_length, counts, rendering.thinking
        ):
            ids, learnt = np.asarray(one.input_ids, dtype=rendering.dtype), stretches_of(one)
            tokens.append(ids)
            stretches.append(learnt)
            examples.append((len(ids), len(learnt), targets_of(learnt), number, digest_of(ids, learnt)))
        file, _, line = conversation.at.rpartition(":")
        place = files.setdefault(file, len(files))
        hashes = question_hash(conversation), group_hash(conversation), content_hash(conversation)
        table.append((place, int(line), *hashes))
        cut = counts.tokens_cut
        for kind in ("skipped", "merged", "truncated"):
            for reason, times in getattr(counts, kind).items():
                which = kinds.setdefault((kind, reason), len(kinds))
                events.append((number, which, times, cut if kind == "truncated" else 0))
                cut = 0 if kind == "truncated" else cut
    return Chunk(
        np.concatenate([np.zeros(0, dtype=rendering.dtype), *tokens]),
        {
            "examples": np.array(examples, dtype=EXAMPLE),
            "stretches": np.concatenate([np.zeros(0, dtype=STRETCH), *stretches]),
            "conversations": np.array(table, dtype=CONVERSATION),
            "events": np.array(events, dtype=EVENT),
        },
        list(files),
        list(kinds),
    )


def content_hash(conversation: Conversation) -> int:
    """64 bits that stand for the turns of a conversation."""
    said = [[one["role"], one["content"]] for one in conversation.messages]
    return int.from_bytes(
        hashlib.blake2b(repr(said).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )
