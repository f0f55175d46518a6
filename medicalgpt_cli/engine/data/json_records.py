"""JSON lines, arrays and objects as a stream of records, strictly: no key twice, no NaN, within bounds."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from medicalgpt_cli.engine.data import limits
from medicalgpt_cli.engine.data.encodings import open_utf8
from medicalgpt_cli.engine.data.known_keys import KEYS
from medicalgpt_cli.engine.data.lines import Wrong, lines_of, whole_text
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.errors import DataError


def json_records(
    path: Path,
    whole_file: bool,
    reading: ReadOptions = AS_FOUND,
    notices: list[str] | None = None,
    wrong: Wrong | None = None,
) -> Iterator[tuple[int, Any]]:
    """(line, or number in an array; value) of JSON lines, or of one array or object over the whole file.

    Args:
        whole_file: whether one object may run over several lines, as in a `.json` file.
        wrong: takes a line that is no JSON; where it is not given, such a line ends the reading.
    """
    with open_utf8(path, reading, notices) as file:
        first = file.read(4096).lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1]
    if first == b"[":
        yield from _array_records(path, reading)
        return
    for line, text in lines_of(path, reading, wrong=wrong):
        if not text.strip():
            continue
        try:
            value = parse_json(text)
        except DataError as problem:
            if whole_file and line == 1:  # an object that runs over several lines
                yield from _object_records(path, reading)
                return
            error = DataError(problem.message, problem.hint, at=f"{path}:{line}")
            if wrong is None:
                raise error from None
            wrong(error)
            continue
        if isinstance(value, list) and whole_file:
            value = value[0] if len(value) == 1 else value
        yield line, value


def _array_records(path: Path, reading: ReadOptions) -> Iterator[tuple[int, Any]]:
    """The elements of one array, taken off the front of a sliding window."""
    with open_utf8(path, reading) as file:
        window = _Window(path, file)
        window.position = window.text_from("[") + 1
        number = 0
        while (next_one := window.skip(" ,"[: 1 + (number > 0)])) not in ("]", ""):
            number += 1
            yield number, window.take(f"{path}:{number}")
        if not next_one:
            raise DataError(
                "not valid JSON: the array is cut short", "was the download complete?", at=str(path)
            )
        window.position += 1
        if window.skip(" "):
            # a file of lists, a line each, is no array of records
            raise DataError(
                "not valid JSON: more behind the end of the array", "one array a file", at=f"{path}:1"
            )


class _Window:
    """A part of a long JSON text. It grows until it holds the next value, and forgets what was taken."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.line = "", 0, 1

    def text_from(self, mark: str) -> int:
        self.grow(1 << 16)
        return self.text.index(mark)

    def grow(self, size: int) -> bool:
        """Read on; False where the file has ended."""
        raw = self.file.read(size)
        at = f"{self.path}:{self.line}"
        if b"\x00" in raw:
            raise DataError("NUL bytes in the text, on this line or behind it", "a torn write?", at=at)
        try:
            more = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as problem:
            line = self.line + raw.count(b"\n", 0, problem.start)
            raise DataError(
                "not UTF-8",
                "--encoding NAME reads a file that is all of another encoding",
                at=f"{self.path}:{line}",
            ) from None
        self.line += more.count("\n")
        self.text, self.position = self.text[self.position :] + more, 0
        return bool(raw)

    def skip(self, letters: str) -> str:
        """Move behind white space and `letters`; gives the character there, "" at the end of the file."""
        while True:
            rest = len(self.text)
            while self.position < rest and (
                self.text[self.position] in letters or self.text[self.position] in "\t\r\n"
            ):
                self.position += 1
            if self.position < rest:
                return self.text[self.position]
            if not self.grow(1 << 16):
                return ""

    def take(self, at: str) -> Any:
        """The value that begins here. The window doubles until it holds the whole of it."""
        size = 1 << 16
        while True:
            try:
                value, self.position = _DECODER.raw_decode(self.text, self.position)
                return value
            except (_DuplicateKey, _Constant, RecursionError):
                break
            except ValueError:  # perhaps only because the value goes on behind the window
                rest = len(self.text) - self.position
                if rest > limits.LONGEST_RECORD or _has_many_parts(self.text) or not self.grow(size):
                    break
                size *= 2
        try:
            return parse_json(self.text[self.position :])
        except DataError as problem:
            raise DataError(problem.message, problem.hint, at=at) from None


def _object_records(path: Path, reading: ReadOptions) -> Iterator[tuple[int, Any]]:
    text = whole_text(path, "one record a line (.jsonl) is read as a stream", reading)
    try:
        value = parse_json(text)
    except DataError as problem:
        raise DataError(
            problem.message, problem.hint, at=f"{path}:{getattr(problem, 'line', None) or 1}"
        ) from None
    inner = value.get("data") if isinstance(value, dict) else None
    yield from enumerate(inner if isinstance(inner, list) else [value], 1)


# -- JSON --------------------------------------------------------------------------------------------------


class _NotJson(DataError):
    """A DataError that knows the line inside the text it was given."""

    line: int | None = None


def parse_json(text: str) -> Any:
    """A JSON value: no key twice, no NaN, of bounded parts. Raises DataError without a position."""
    if _has_many_parts(text):
        raise _NotJson(
            f"more than {limits.MOST_PARTS:,} lists and objects in one record",
            "a record is an object of texts",
        )
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as problem:
        error = _NotJson(f"not valid JSON (column {problem.colno})", _json_hint(text, problem.pos))
        error.line = problem.lineno
    except (_DuplicateKey, _Constant) as problem:
        error = _NotJson(str(problem), problem.hint)
        error.line = None
    except ValueError:  # Python reads no number of more than 4,300 digits
        error = _NotJson("a number with too many digits", "write it as text")
        error.line = None
    except RecursionError:
        error = _NotJson("nested too deeply", "a record is an object of texts, not a tree")
        error.line = None
    raise error from None


def _has_many_parts(text: str) -> bool:
    """Whether it could become more lists and objects than a record has: each takes far more than its brackets."""
    return len(text) > limits.MOST_PARTS and text.count("[") + text.count("{") > limits.MOST_PARTS


class _DuplicateKey(Exception):
    hint = "keep one of them"


class _Constant(Exception):
    hint = "write null or leave the field out"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        place = next(place for place, key in enumerate(keys) if first[key] < place)
        name = f"the key {keys[place]}" if keys[place] in KEYS else f"key {place + 1} of an object"
        raise _DuplicateKey(f"{name} stood there before")
    return found


def _no_constant(name: str) -> Any:
    raise _Constant(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


def _json_hint(text: str, position: int) -> str:
    near = text[max(position - 1, 0) : position + 1]
    if any(quote in text[:50] for quote in "“”＂"):
        return "full-width quotes: JSON needs the plain double quote"
    if text.lstrip()[:2] in ("{'", "['"):
        return "single quotes: this looks like a Python dict; JSON needs double quotes"
    if "," in near and any(end in text[position : position + 2] for end in "}]"):
        return "a comma before a closing bracket?"
    return "is the line cut short?" if position >= len(text.rstrip()) - 1 else "one JSON object a line"
