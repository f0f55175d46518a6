"""Seconds and memory of a run that finds millions of tokenised conversations in its cache.

    python -m tests.benchmarks.large_table FOLDER [CONVERSATIONS]

Writes a table of made-up examples (ids without a text) into FOLDER, as `engine/data/tokenising` would, and does with it
what `sft` does before the model is loaded: proves its hashes, splits by question, counts, and draws an epoch.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.example_table import (
    CONVERSATION,
    EVENT,
    EXAMPLE,
    STRETCH,
    Chunk,
    ExampleTable,
    Part,
    PartWriter,
    side_counts,
)
from medicalgpt_cli.engine.data.report import figures
from medicalgpt_cli.engine.data.splitting import held_out, roots_of
from medicalgpt_cli.engine.run import checkpoints
from medicalgpt_cli.engine.training.batches import EpochSampler

CHUNK = 4096


def write(folder: Path, conversations: int) -> None:
    choose = np.random.default_rng(0)
    writer = PartWriter(folder)
    for start in range(0, conversations, CHUNK):
        size = min(CHUNK, conversations - start)
        lengths = choose.integers(40, 300, size)
        examples, table = np.zeros(size, EXAMPLE), np.zeros(size, CONVERSATION)
        stretches = np.zeros(size, STRETCH)
        examples["length"], examples["stretches"], examples["targets"] = lengths, 1, lengths // 2
        examples["conversation"], examples["digest"] = np.arange(size), choose.integers(0, 2**63, size)
        stretches["begin"], stretches["end"], stretches["weight"] = lengths - lengths // 2, lengths, 1.0
        table["line"], table["question"] = start + np.arange(size) + 1, choose.integers(0, 2**63, size)
        table["content"] = table["question"]
        tokens = choose.integers(0, 49_152, int(lengths.sum()), dtype=np.uint16)
        tables = {
            "examples": examples,
            "stretches": stretches,
            "conversations": table,
            "events": np.zeros(0, EVENT),
        }
        writer.add(Chunk(tokens, tables, ["made.jsonl"]))
    writer.finish(np.dtype("<u2"), Counts(read=conversations).as_dict(), key=folder.name)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    folder = Path(sys.argv[1])
    conversations = int(sys.argv[2]) if len(sys.argv) > 2 else 3_000_000
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.process_time()
    write(folder, conversations)
    print(
        json.dumps(
            {
                "written": conversations,
                "processor_seconds": round(time.process_time() - begin, 1),
                "peak_mib": peak(),
            }
        )
    )
    begin, before = time.process_time(), peak()
    assert checkpoints.problem(folder) is None
    proved = time.process_time() - begin
    part = Part.open(folder)
    out = held_out(roots_of(part.conversations["question"], part.conversations["group"]), 0.01, 42)
    training = ExampleTable([part], [np.flatnonzero(~out[part.examples["conversation"]])])
    side_counts([part], [~out])
    figures(training.lengths.tolist(), int(training.targets.sum()), 1024)
    training.fingerprint()
    sampler = EpochSampler(training.lengths, 8, 42, by_length=True)
    order = list(sampler)
    ready = time.process_time() - begin
    begin = time.process_time()
    for index in order[:2000]:
        training[index]
    print(
        json.dumps(
            {
                "bytes": sum(one.stat().st_size for one in folder.iterdir()),
                "hashes_proved_s": round(proved, 1),
                "ready_s": round(ready, 1),
                "microseconds_an_example": round((time.process_time() - begin) / 2000 * 1e6),
                "peak_mib_before": before,
                "peak_mib": peak(),
            }
        )
    )


if __name__ == "__main__":
    main()
