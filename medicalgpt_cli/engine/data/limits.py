"""How much one file may take: bounds on records, on what packed files unpack to, and on child processes.

docs/operations.md lists them. What a library builds without a bound of its own runs in a child process
(engine/run/bounded.py).
"""

from __future__ import annotations

LONGEST_RECORD = (
    64 * 1024 * 1024
)  # bytes of one record: a line, a table's row, a document between blank lines
LARGEST_WHOLE = 1 << 30  # bytes of a file that is read as a whole: one object, or one document
MOST_PARTS = 2_000_000  # lists and objects in one record
MOST_COLUMNS = 16_384  # of a table, as many as a sheet of Excel has

# A packed file may unpack to so many bytes, and beyond that to so many for each of its own.
UNPACKED, UNPACKED_RATIO = 256 * 1024 * 1024, 200

CHILD_MEMORY = (
    2 << 30
)  # bytes of address space of a child that unpacks a file, beside a multiple of the file's own
CHILD_UNPACKED, CHILD_RATIO = 1 << 30, 1000  # what it may send; a repeated value is stored once

DOCUMENT_SECONDS = 120  # of processor time to turn a document into text, and beyond that
DOCUMENT_SECONDS_A_MIB = 60  # so many for each MiB of the file
