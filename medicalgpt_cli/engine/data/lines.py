"""Text files line by line, strictly UTF-8, and their documents."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from medicalgpt_cli.engine.data import limits
from medicalgpt_cli.engine.data.encodings import open_utf8
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.errors import DataError

Wrong = Callable[[DataError], None]  # takes what is wrong with a line, so that reading goes on behind it

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "ZIP",
    b"PAR1": "Parquet",
    b"%PDF-": "PDF",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "Microsoft Office",
}


def lines_of(
    path: Path,
    reading: ReadOptions = AS_FOUND,
    notices: list[str] | None = None,
    wrong: Wrong | None = None,
) -> Iterator[tuple[int, str]]:
    """(number, text) of each line of a file; errors as `open_utf8` and `text_lines` have them."""
    with open_utf8(path, reading, notices) as file:
        yield from text_lines(file, str(path), wrong)


def text_lines(file: IO[bytes], name: str, wrong: Wrong | None = None) -> Iterator[tuple[int, str]]:
    """(number, text) of each line, strictly UTF-8. Only a line feed ends a line, U+2028 does not.

    Args:
        wrong: takes a line that is no text; where it is not given, such a line ends the reading.

    Raises:
        DataError: what stands there is no text; `name` stands in front of the line's number.
    """
    for number, text in raw_lines(file, name, wrong):
        yield number, text.rstrip("\r\n")


def raw_lines(file: IO[bytes], name: str, wrong: Wrong | None = None) -> Iterator[tuple[int, str]]:
    """As `text_lines`, each with its end of line."""
    for number, raw in enumerate(iter(lambda: file.readline(limits.LONGEST_RECORD + 1), b""), 1):
        at = f"{name}:{number}"
        if len(raw) > limits.LONGEST_RECORD:
            raise DataError(
                f"a line of more than {limits.LONGEST_RECORD // 2**20} MiB", "one record a line", at=at
            )
        if number == 1:
            refuse_other_kinds(name, raw)
        if raw.startswith(codecs.BOM_UTF8):
            raw = raw[3:]  # also where two files were joined
        try:
            text = _decoded(raw, at)
        except DataError as problem:
            if wrong is None:
                raise
            wrong(problem)
            continue
        yield number, text


def _decoded(raw: bytes, at: str) -> str:
    if b"\x00" in raw:
        many = raw.count(b"\x00") > len(raw) // 4
        hint = "is it UTF-16? --encoding utf-16-le or utf-16-be reads it" if many else "a torn write?"
        raise DataError("NUL bytes in the text", hint, at=at)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(
            f"not UTF-8 (byte {problem.start + 1} of the line){_other_encoding(raw)}",
            "--encoding NAME reads a file that is all of another encoding",
            at=at,
        ) from None


def refuse_other_kinds(source: str, head: bytes) -> None:
    """
    Raises:
        DataError: a file's first line is that of a packed file, a web page, a Git LFS pointer or a program.
    """
    at = f"{source}:1"
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"this is a {name} file under another name", "unpack it, or give it its own ending", at=at
            )
    start = head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:200].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise DataError("this is a web page, not data", "the download saved an error page?", at=at)
    if start.startswith(b"version https://git-lfs"):
        raise DataError("this is a Git LFS pointer, not the data", "fetch the data: git lfs pull", at=at)
    sample = head[:1024]
    control = sum(byte < 9 or 13 < byte < 32 for byte in sample)
    if control and b"\x00" in sample and control > len(sample) // 20 and not _looks_utf16(sample):
        raise DataError("this is a binary file, not text", "check the path", at=at)


def _looks_utf16(sample: bytes) -> bool:
    return max(sample[0::2].count(0), sample[1::2].count(0)) > len(sample) // 4


def _other_encoding(raw: bytes) -> str:
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    chinese = sum("\u4e00" <= char <= "\u9fff" for char in text)
    return "; it reads as GBK / GB18030" if chinese * 4 > len(text) else ""


def whole_text(
    path: Path, hint: str, reading: ReadOptions = AS_FOUND, notices: list[str] | None = None
) -> str:
    """A text file as one text.

    Raises:
        DataError: it is longer than what is read in one piece; `hint` says what to do.
    """
    lines, size = [], 0
    for number, text in lines_of(path, reading, notices):
        lines.append(text)
        size += len(text)
        if size > limits.LARGEST_WHOLE:
            raise DataError(
                f"more than {limits.LARGEST_WHOLE // 2**20:,} MiB in one piece", hint, at=f"{path}:{number}"
            )
    return "\n".join(lines)


def unit_of(path: Path, reading: ReadOptions = AS_FOUND) -> str:
    """ "block" where the first lines of a text file have blank ones between text, else "line"."""
    blank_seen = text_seen = False
    for number, (_, text) in enumerate(lines_of(path, reading)):
        if text.strip() and blank_seen:
            return "block"
        text_seen = text_seen or bool(text.strip())
        blank_seen = text_seen and (blank_seen or not text.strip())
        if number > 20_000:
            break
    return "line"


def documents_of_text(
    path: Path, unit: str, reading: ReadOptions = AS_FOUND, notices: list[str] | None = None
) -> Iterator[tuple[int, str]]:
    """(first line, text) of each document of a text file.

    Args:
        unit: "line", "block" (between blank lines) or "file".
    """
    if unit == "file":
        text = whole_text(
            path, "--text-unit block makes a document of what stands between blank lines", reading, notices
        )
        if text.strip():
            yield 1, text
        return
    block: list[str] = []
    began, size = 1, 0
    for line, text in lines_of(path, reading, notices):
        if unit == "line":
            if text.strip():
                yield line, text
        elif not text.strip():
            if block:
                yield began, "\n".join(block)
            block, size = [], 0
        else:
            began = line if not block else began
            block.append(text)
            size += len(text)
            if size > limits.LONGEST_RECORD:
                raise DataError(
                    f"a document of more than {limits.LONGEST_RECORD // 2**20} MiB",
                    "a blank line ends a document, --text-unit line makes one of each line",
                    at=f"{path}:{began}",
                )
    if block:
        yield began, "\n".join(block)
