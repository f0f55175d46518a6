"""Parquet files, unpacked by a child process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data import limits, parquet_child
from medicalgpt_cli.engine.data.containers import must_be_a_file
from medicalgpt_cli.engine.run import bounded
from medicalgpt_cli.errors import DataError, UnsafeRefused


def parquet_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, record), unpacked within so much memory: a KB of Parquet can stand for gigabytes."""
    import pyarrow
    import pyarrow.ipc

    must_be_a_file(path)
    packed = path.stat().st_size
    memory = limits.CHILD_MEMORY + 2 * packed
    child = bounded.start(Path(parquet_child.__file__), [str(path)], memory=memory)
    number = size = 0
    try:
        with contextlib.suppress(pyarrow.ArrowInvalid, OSError):  # its exit code says more
            for batch in pyarrow.ipc.open_stream(child.stdout):
                size += batch.nbytes + batch.num_rows
                if size > max(limits.CHILD_UNPACKED, limits.CHILD_RATIO * packed):
                    raise UnsafeRefused(
                        f"{path}: it unpacks to more than {limits.CHILD_RATIO:,} times its size",
                        "look at it first",
                    )
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
            child.wait()
        code = child.wait()
    finally:
        child.kill()
        child.communicate()
    if code == parquet_child.NOT_PARQUET:
        raise DataError("not a Parquet file, or a damaged one", "was the download complete?", at=str(path))
    if code == parquet_child.LONG_RECORD:
        raise DataError(
            f"a record of more than {parquet_child.LARGEST // 2**20} MiB",
            "cut it into several",
            at=f"{path}, behind record {number}",
        )
    if code:
        raise UnsafeRefused(
            f"{path}: it takes more than {bounded.why_ended(code, memory=memory)} to unpack",
            "write it anew with smaller row groups, or as .jsonl",
        )
