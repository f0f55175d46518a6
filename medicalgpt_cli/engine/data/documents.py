"""`.docx`, `.pptx`, `.pdf` and `.html` to text, one document a file, on this machine alone.

The work is done by markitdown and pdfplumber (the extra `documents`) in a child process within bounds of memory and
time, which opens no connection and no file but the document (document_child.py).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data import document_child, limits
from medicalgpt_cli.engine.data.containers import must_be_a_file
from medicalgpt_cli.engine.data.encodings import encoding_of
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.engine.run import bounded
from medicalgpt_cli.errors import DataError, EnvironmentFailure, MedgptError, UnsafeRefused

SUFFIXES = (".docx", ".pptx", ".pdf", ".html", ".htm")
_NEEDED = {".docx": ("markitdown", "mammoth"), ".pptx": ("markitdown", "pptx"), ".pdf": ("pdfplumber",)}


def document_text(path: Path, reading: ReadOptions = AS_FOUND, notices: list[str] | None = None) -> str:
    """The text of a document; "" where it holds none. Pages without text are counted in a notice.

    Raises:
        EnvironmentFailure: the extra is not installed.
        DataError: no document of its kind, a locked one, or none of its pages holds text.
        UnsafeRefused: it needs more memory or time than it may.
    """
    must_be_a_file(path)
    kind = path.suffix.lower()
    missing = [one for one in _NEEDED.get(kind, ("markitdown",)) if importlib.util.find_spec(one) is None]
    if missing:
        raise EnvironmentFailure(
            f"{path}: {kind} files are read with {missing[0]}, which is not installed",
            "pip install 'medicalgpt-cli[documents]'",
        )
    encoding = "utf-8"
    if kind in (".html", ".htm"):
        encoding = reading.encoding or _encoding(path, notices)
    found = _converted(path, encoding)
    if found["pages"] and found["empty"]:
        _say_empty_pages(path, found, notices)
    return found["text"]


def _encoding(path: Path, notices: list[str] | None) -> str:
    with path.open("rb") as file:
        encoding = encoding_of(file)
    if encoding != "utf-8" and notices is not None:
        notices.append(f"{path}: read as {encoding.upper()}, because it is not UTF-8")
    return encoding


def _converted(path: Path, encoding: str) -> dict[str, Any]:
    size = path.stat().st_size
    memory = limits.CHILD_MEMORY + 20 * size
    seconds = limits.DOCUMENT_SECONDS + limits.DOCUMENT_SECONDS_A_MIB * size // 2**20
    child = bounded.start(
        Path(document_child.__file__), [str(path), encoding], memory=memory, seconds=seconds
    )
    try:
        said, _ = child.communicate(timeout=2 * seconds)
        code = child.returncode
    except subprocess.TimeoutExpired:
        raise UnsafeRefused(f"{path}: it takes more than {seconds} s to read", _SMALLER) from None
    finally:
        child.kill()
        child.communicate()
    if code in _PROBLEMS:
        message, hint = _PROBLEMS[code]
        raise DataError(message, hint, at=str(path))
    if code == 1:
        raise MedgptError(
            f"{path}: the program that reads it failed", "save its text as .txt; and please report it"
        )
    if code:
        bound = bounded.why_ended(code, memory=memory, seconds=seconds)
        raise UnsafeRefused(f"{path}: it takes more than {bound} to read", _SMALLER)
    return json.loads(said)


_SMALLER = "cut it into smaller files, or save its text as .txt"
_PROBLEMS = {
    document_child.NO_DOCUMENT: ("not a document of its kind, or a damaged one", "can its program open it?"),
    document_child.LOCKED: ("the document is locked with a password", "save it without"),
    document_child.LONG: (
        f"a document of more than {limits.LONGEST_RECORD // 2**20} MiB of text", "cut it into smaller files",
    ),
    document_child.OTHER_ENCODING: (
        "its text is of another encoding than UTF-8 and GB18030", "--encoding NAME reads it",
    ),
    document_child.NESTED: ("nested too deeply", "save its text as .txt"),
    document_child.REACHES_OUT: ("it wants another file or a connection", "remove what it links to"),
}  # fmt: skip


def _say_empty_pages(path: Path, found: dict[str, Any], notices: list[str] | None) -> None:
    pages, empty = found["pages"], found["empty"]
    word = "scanned, or in fonts that do not say which letters they show"
    if len(empty) == pages:
        raise DataError(
            f"none of its {pages:,} pages holds text: {word}",
            "recognise the text first (OCR), and give the result",
            at=str(path),
        )
    if notices is not None:
        notices.append(
            f"{path}: {len(empty):,} of {pages:,} pages hold no text ({word}), such as page {empty[0]}"
        )
