"""Unpack a Parquet file: `parquet_child.py FILE`, within limits, as a stream of small Arrow batches.

A script of its own, that imports nothing of medgpt (engine/run/bounded.py). A few bytes of Parquet can stand for any
number of values; what goes out is bounded, so that the reader can turn each batch into objects.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

NOT_PARQUET = 65
LONG_RECORD = 66
LARGEST = 64 * 1024 * 1024  # bytes of a batch, and so of a record
_ROWS = 1024


def send(path: str) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False)
        plain = pyarrow.schema([_plain(pyarrow, one) for one in file.schema_arrow])
        with pyarrow.ipc.new_stream(sys.stdout.buffer, plain) as out:
            for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
                for part in _parts(pyarrow, batch):
                    out.write_batch(_decoded(pyarrow, part, plain))
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError):
        sys.exit(NOT_PARQUET)


def _plain(pyarrow: Any, field: Any) -> Any:
    kind = field.type
    return pyarrow.field(
        field.name, kind.value_type if pyarrow.types.is_dictionary(kind) else kind, field.nullable
    )


def _decoded(pyarrow: Any, batch: Any, schema: Any) -> Any:
    columns = [
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def _parts(pyarrow: Any, batch: Any) -> Iterator[Any]:
    """The batch in pieces of a bounded size; a record that is larger ends the program."""
    if sum(_weight(pyarrow, column) for column in batch.columns) <= LARGEST:
        yield batch
    elif batch.num_rows == 1:
        sys.exit(LONG_RECORD)
    else:
        half = batch.num_rows // 2
        yield from _parts(pyarrow, batch.slice(0, half))
        yield from _parts(pyarrow, batch.slice(half))


def _weight(pyarrow: Any, array: Any) -> int:
    """About the bytes that the values take as objects: what they hold, and a pointer for each."""
    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    own = array.nbytes + 8 * len(array)
    if pyarrow.types.is_struct(kind):
        return own + sum(_weight(pyarrow, one) for one in array.flatten())
    if pyarrow.types.is_map(kind):
        return own + _weight(pyarrow, array.keys) + _weight(pyarrow, array.items)
    if pyarrow.types.is_nested(kind) and hasattr(array, "flatten"):
        return own + _weight(pyarrow, array.flatten())
    return own


if __name__ == "__main__":
    send(sys.argv[1])
