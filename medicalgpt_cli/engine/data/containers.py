"""The bytes of a file, unpacked where its name says that it is packed, and never without a bound."""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from medicalgpt_cli.engine.data import limits
from medicalgpt_cli.errors import DataError, UnsafeRefused

COMPRESSIONS = (".gz", ".zst")


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where its name ends with .gz or .zst.

    Raises:
        DataError: it is damaged or cannot be read.
        UnsafeRefused: it is a pipe or a device, or unpacks to much more than a text does.
    """
    suffix = path.suffix.lower()
    try:
        must_be_a_file(path)
        with path.open("rb") as raw:
            if suffix == ".zst":
                import zstandard

                unpacking = zstandard.ZstdDecompressor(max_window_size=1 << 27)
                try:
                    with unpacking.stream_reader(raw, read_across_frames=True) as packed:
                        yield io.BufferedReader(_Unpacked(path, raw, packed), 1 << 20)
                except zstandard.ZstdError:
                    raise DataError(
                        "not a Zstandard file, or a damaged one", "was the download complete?", at=str(path)
                    ) from None
            elif suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as packed:
                    yield io.BufferedReader(_Unpacked(path, raw, packed), 1 << 20)
            else:
                yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        word = "is cut short" if isinstance(problem, EOFError) else "is not a gzip file, or a damaged one"
        raise DataError(f"the file {word}", "was the download complete?", at=str(path)) from None
    except OSError as problem:
        raise DataError(
            f"{problem.strerror or type(problem).__name__}", "check the path", at=str(path)
        ) from None


class _Unpacked(io.RawIOBase):
    """The bytes of a packed file, as long as they are no more than a text can unpack to."""

    def __init__(self, path: Path, raw: IO[bytes], packed: Any):
        self.path, self.raw, self.packed = path, raw, packed
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.packed.readinto(buffer)
        self.size += count
        if self.size > limits.UNPACKED and self.size > limits.UNPACKED_RATIO * self.raw.tell():
            raise UnsafeRefused(
                f"{self.path}: it unpacks to more than {limits.UNPACKED_RATIO} times its size",
                "unpack it and look at it; text unpacks to five or ten times",
            )
        return count


def must_be_a_file(path: Path) -> None:
    """Refuse pipes and devices: what comes out of them may never begin, or never end.

    Raises:
        UnsafeRefused: it is one.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise UnsafeRefused(
            f"{path} is {kind}, not a file",
            "write what it gives into a file; `infer` also takes - for a pipe",
        )
