"""The header of a GGUF file, walked through before a library believes it.

The library makes as many entries as the header claims, also where the file ends long before: a file of a few bytes that
claims an array of 2^40 numbers takes all memory there is. Layout: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from medicalgpt_cli.errors import UnsafeRefused, UsageError

# Bytes of each type of value, by its number; a string and an array say how long they are.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8
_SMALLEST = {"settings": 8 + 4 + 1, "tensors": 8 + 4 + 4 + 8}  # bytes that an entry takes at least


class _Header:
    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def number(self, form: str) -> int:
        width = struct.calcsize(form)
        return struct.unpack(form, self._read(width))[0]

    def _read(self, count: int) -> bytes:
        found = self.file.read(count)
        if len(found) < count:
            raise EOFError
        return found

    def holds(self, what: str, count: int, each: int) -> None:
        left = self.size - self.file.tell()
        if count * each > left:
            raise UnsafeRefused(
                f"{self.file.name}: the header claims {count:,} {what}, and the file has {left:,} bytes left",
                "the file is damaged, or was made to take all memory: take it anew from its source",
            )

    def skip(self, what: str, count: int, each: int = 1) -> None:
        self.holds(what, count, each)
        self.file.seek(count * each, 1)

    def string(self) -> None:
        self.skip("bytes of text", self.number("<Q"))

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if kind == _STRING:
                self.holds("texts", count, 8)
                for _ in range(count):
                    self.string()
            else:  # arrays of arrays are none that a model has
                self.skip("numbers", count, self.width(kind))
        else:
            self.skip("numbers", 1, self.width(kind))

    def width(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(kind)
        return _SIZES[kind]


def check_header(path: Path) -> None:
    """See that the header of a GGUF file claims no more than the file holds.

    Raises:
        UnsafeRefused: it does.
        UsageError: it is no GGUF file of version 2 or 3, or ends in its header.
    """
    with path.open("rb") as file:
        header = _Header(file, path.stat().st_size)
        try:
            if file.read(4) != b"GGUF" or header.number("<I") not in (2, 3):
                raise ValueError
            tensors, settings = header.number("<Q"), header.number("<Q")
            for what, count in (("settings", settings), ("tensors", tensors)):
                header.holds(what, count, _SMALLEST[what])
            for _ in range(settings):
                header.string()
                header.value(header.number("<I"))
            for _ in range(tensors):
                header.string()
                dimensions = header.number("<I")
                if dimensions > _MOST_DIMENSIONS:
                    raise ValueError
                header.skip("dimensions", dimensions, 8)
                header.skip("bytes of a tensor's place", 4 + 8)
        except (EOFError, ValueError):
            raise UsageError(
                f"{path}: no GGUF file of version 2 or 3, or cut off", "was the copy complete?"
            ) from None
