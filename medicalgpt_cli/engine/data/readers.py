"""Files to rows: every container and encoding that is accepted, and a clear word about each that is not.

A row keeps its file and line, so that whatever is wrong with it later can be named. No message quotes what a
row says: it may be about a patient.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medicalgpt_cli.engine.data.folders import FolderFiles
from medicalgpt_cli.engine.data.known_keys import KEYS
from medicalgpt_cli.engine.run import bounded
from medicalgpt_cli.engine.run.hub_names import is_hub_name, nearest_path
from medicalgpt_cli.errors import DataError, UnsafeRefused, UsageError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
COMPRESSIONS = (".gz", ".zst")
_LONGEST = 64 * 1024 * 1024  # bytes of one record
_LARGEST_WHOLE = 1 << 30  # bytes of a file that is read as a whole: one object, or one document
_MOST_PARTS = 2_000_000  # lists and objects in one record
# A packed file may unpack to so many bytes, and beyond that to so many for each of its own.
_UNPACKED, _UNPACKED_RATIO = 256 * 1024 * 1024, 200
_PARQUET_MEMORY = 2 << 30  # bytes for unpacking, beside twice the file's own
_PARQUET_UNPACKED, _PARQUET_RATIO = 1 << 30, 1000  # a value that is the same in all records is stored once


@dataclass(frozen=True)
class Row:
    """One record: `value` is an object of a JSON file, a table row, or a piece of text."""

    path: str
    line: int  # the line in a text file, the record's number in an array or a table; from 1
    value: Any

    @property
    def at(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub, `owner/name` or `owner/name:split`."""

    name: str
    split: str


def expand_sources(
    sources: Sequence[str], notices: list[str] | None = None
) -> tuple[list[Path | HubDataset], list[str]]:
    """Files of the named files, folders and hub data sets, in a fixed order.

    Args:
        notices: takes a line for each thing worth knowing about a folder (`FolderFiles`).

    Returns:
        The files, and the names of files in folders that are of no known kind.

    Raises:
        DataError: a path does not exist, a folder holds nothing that can be read, or a part of it cannot be.
    """
    found: list[Path | HubDataset] = []
    ignored: list[str] = []
    for source in sources:
        path = Path(source)
        if _access(path) and path.is_dir():
            inside = FolderFiles(path)
            known = [file for file in inside.files if _kind(file)]
            ignored += [str(file) for file in inside.files if not _kind(file)]
            if notices is not None:
                notices += inside.notices(_kind)
            if not known:
                raise DataError(
                    f"{source}: no data file in this folder", f"known endings: {', '.join(SUFFIXES)}"
                )
            found += known
        elif path.exists():
            if not _kind(path):
                raise DataError(
                    f"{source}: unknown ending", f"known endings: {', '.join(SUFFIXES)}, also .gz, .zst"
                )
            found.append(path)
        elif _looks_like_hub_name(source):
            name, _, split = source.partition(":")
            found.append(HubDataset(name, split or "train"))
        else:
            raise DataError(f"{source}: no such file or folder", _nearest(path))
    return found, ignored


def read_rows(
    source: Path | HubDataset, *, text_unit: str = "line", notices: list[str] | None = None
) -> Iterator[Row]:
    """The rows of one file, read as a stream.

    Args:
        text_unit: what a document of a text file is: "line", "block" (between blank lines) or "file".
        notices: takes a line for each thing worth knowing (an encoding other than UTF-8).

    Raises:
        DataError: what is wrong, with the file and line.
    """
    if isinstance(source, HubDataset):
        yield from _hub_rows(source)
        return
    kind = _kind(source)
    if kind == ".parquet":
        yield from _parquet_rows(source)
    elif kind in (".csv", ".tsv"):
        yield from _table_rows(source, "\t" if kind == ".tsv" else ",", notices)
    elif kind in (".txt", ".md"):
        yield from _text_rows(source, text_unit)
    else:
        yield from _json_rows(source)


def is_text(source: Path | HubDataset) -> bool:
    """Whether a source is a plain text file, whose documents are a matter of `text_unit`."""
    return isinstance(source, Path) and _kind(source) in (".txt", ".md")


def check_text_unit(sources: Sequence[str], text_unit: str) -> None:
    """
    Raises:
        UsageError: a `--text-unit` is asked for, and none of the sources is a text file.
        DataError: a source is missing.
    """
    if text_unit == "auto":
        return
    files, _ = expand_sources(sources)
    if not any(is_text(file) for file in files):
        raise UsageError(
            f"--text-unit {text_unit}: {sources[0]} has its documents as records",
            "leave it out: it is about .txt and .md files",
        )


def unit_of(path: Path) -> str:
    """ "block" where the first lines of a text file have blank ones between text, else "line"."""
    blank_seen = text_seen = False
    for number, (_, text) in enumerate(_lines(path)):
        if text.strip() and blank_seen:
            return "block"
        text_seen = text_seen or bool(text.strip())
        blank_seen = text_seen and (blank_seen or not text.strip())
        if number > 20_000:
            break
    return "line"


# -- kinds of files ----------------------------------------------------------------------------------------


def _json_rows(path: Path) -> Iterator[Row]:
    """JSON lines, or one array or object over the whole file."""
    with _open(path) as file:
        first = _first_character(path, file)
    if first == b"[":
        yield from _array_rows(path)
        return
    whole_file = _kind(path) == ".json"
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            value = parse_json(text)
        except DataError as problem:
            if whole_file and line == 1:  # an object that runs over several lines
                yield from _object_rows(path)
                return
            raise DataError(problem.message, problem.hint, at=f"{path}:{line}") from None
        if isinstance(value, list) and whole_file:
            value = value[0] if len(value) == 1 else value
        yield Row(str(path), line, value)


def _array_rows(path: Path) -> Iterator[Row]:
    """The elements of one array, taken off the front of a sliding window."""
    with _open(path) as file:
        window = _Window(path, file)
        window.position = window.text_from("[") + 1
        number = 0
        while (next_one := window.skip(" ,"[: 1 + (number > 0)])) not in ("]", ""):
            number += 1
            yield Row(str(path), number, window.take(f"{path}:{number}"))
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
                f"not UTF-8{_other_encoding(raw)}", "convert the file to UTF-8", at=f"{self.path}:{line}"
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
                if rest > _LONGEST or _has_many_parts(self.text) or not self.grow(size):
                    break
                size *= 2
        try:
            return parse_json(self.text[self.position :])
        except DataError as problem:
            raise DataError(problem.message, problem.hint, at=at) from None


def _object_rows(path: Path) -> Iterator[Row]:
    text = _whole(path, "one record a line (.jsonl) is read as a stream")
    try:
        value = parse_json(text)
    except DataError as problem:
        raise DataError(problem.message, problem.hint, at=f"{path}:{problem.line or 1}") from None
    inner = value.get("data") if isinstance(value, dict) else None
    for number, one in enumerate(inner if isinstance(inner, list) else [value], 1):
        yield Row(str(path), number, one)


def _whole(path: Path, hint: str) -> str:
    lines, size = [], 0
    for number, text in _lines(path):
        lines.append(text)
        size += len(text)
        if size > _LARGEST_WHOLE:
            raise DataError(
                f"more than {_LARGEST_WHOLE // 2**20:,} MiB in one piece", hint, at=f"{path}:{number}"
            )
    return "\n".join(lines)


def _text_rows(path: Path, unit: str) -> Iterator[Row]:
    if unit == "file":
        text = _whole(path, "--text-unit block makes a document of what stands between blank lines")
        if text.strip():
            yield Row(str(path), 1, text)
        return
    block: list[str] = []
    began, size = 1, 0
    for line, text in _lines(path):
        if unit == "line":
            if text.strip():
                yield Row(str(path), line, text)
        elif unit == "block" and not text.strip():
            if block:
                yield Row(str(path), began, "\n".join(block))
            block, size = [], 0
        else:
            began = line if not block else began
            block.append(text)
            size += len(text)
            if size > _LONGEST:
                raise DataError(
                    f"a document of more than {_LONGEST // 2**20} MiB",
                    "a blank line ends a document, --text-unit line makes one of each line",
                    at=f"{path}:{began}",
                )
    if block and any(text.strip() for text in block):
        yield Row(str(path), began, "\n".join(block))


def _table_rows(path: Path, delimiter: str, notices: list[str] | None) -> Iterator[Row]:
    encoding = _table_encoding(path)
    if encoding != "utf-8-sig" and notices is not None:
        notices.append(f"{path}: read as {encoding.upper()}, because it is not UTF-8")
    csv.field_size_limit(_LONGEST)
    with _open(path) as raw:
        lines = _TableLines(path, io.TextIOWrapper(raw, encoding=encoding, newline=""))
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{len(reader.fieldnames or ())} columns were expected, this row has another number",
                        "a text with commas or line ends has to stand in double quotes",
                        at=f"{path}:{reader.line_num}",
                    )
                lines.size = 0
                yield Row(str(path), reader.line_num, row)
        except csv.Error as problem:
            raise DataError(
                f"not a valid table ({problem})", "check the quotes", at=f"{path}:{reader.line_num}"
            ) from None


class _TableLines:
    """The lines of a table, for the csv module, which would take a record of any length."""

    def __init__(self, path: Path, file: IO[str]):
        self.path, self.file = path, file
        self.number = self.size = 0  # lines so far; characters of the record so far

    def __iter__(self) -> _TableLines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(_LONGEST + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.size += len(line)
        if self.size > _LONGEST:
            raise DataError(
                f"a record of more than {_LONGEST // 2**20} MiB",
                "is a double quote missing?",
                at=f"{self.path}:{self.number}",
            )
        return line


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Unpacked by a child process that may use only so much memory: a KB of Parquet can stand for gigabytes."""
    import pyarrow
    import pyarrow.ipc

    from medicalgpt_cli.engine.data import parquet_child

    must_be_a_file(path)
    packed = path.stat().st_size
    memory = _PARQUET_MEMORY + 2 * packed
    child = bounded.start(Path(parquet_child.__file__), [str(path)], memory=memory)
    number = size = 0
    try:
        with contextlib.suppress(pyarrow.ArrowInvalid, OSError):  # its exit code says more
            for batch in pyarrow.ipc.open_stream(child.stdout):
                size += batch.nbytes + batch.num_rows
                if size > max(_PARQUET_UNPACKED, _PARQUET_RATIO * packed):
                    raise UnsafeRefused(
                        f"{path}: it unpacks to more than {_PARQUET_RATIO:,} times its size",
                        "look at it first",
                    )
                for value in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, value)
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


def _hub_rows(source: HubDataset) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(source.name, split=source.split)
    except Exception as problem:
        raise DataError(
            f"{source.name}: no such file, and the hub data set cannot be loaded ({type(problem).__name__})",
            "check the path; offline, only data sets that are in the cache can be used",
        ) from None
    for number, value in enumerate(data, 1):
        yield Row(source.name, number, value)


# -- bytes to text -----------------------------------------------------------------------------------------

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"PK\x03\x04": "ZIP", b"PAR1": "Parquet"}


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where its name says that it is packed.

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
        if self.size > _UNPACKED and self.size > _UNPACKED_RATIO * self.raw.tell():
            raise UnsafeRefused(
                f"{self.path}: it unpacks to more than {_UNPACKED_RATIO} times its size",
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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as file:
        yield from text_lines(file, str(path))


def text_lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each line, strictly UTF-8. Only a line feed ends a line, U+2028 does not.

    Raises:
        DataError: what stands there is no text; `name` stands in front of the line's number.
    """
    for number, raw in enumerate(iter(lambda: file.readline(_LONGEST + 1), b""), 1):
        at = f"{name}:{number}"
        if len(raw) > _LONGEST:
            raise DataError(f"a line of more than {_LONGEST // 2**20} MiB", "one record a line", at=at)
        if number == 1:
            _refuse_other_kinds(name, raw)
        if raw.startswith(codecs.BOM_UTF8):
            raw = raw[3:]  # also where two files were joined
        if b"\x00" in raw:
            hint = (
                "is it UTF-16? convert it to UTF-8" if raw.count(b"\x00") > len(raw) // 4 else "a torn write?"
            )
            raise DataError("NUL bytes in the text", hint, at=at)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise DataError(
                f"not UTF-8 (byte {problem.start + 1} of the line){_other_encoding(raw)}",
                "convert the file, for example: iconv -f GB18030 -t UTF-8",
                at=at,
            ) from None
        yield number, text.rstrip("\r\n")


def _refuse_other_kinds(source: str, head: bytes) -> None:
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
    control = sum(byte < 9 or 13 < byte < 32 for byte in head[:1024])
    if control and b"\x00" in head[:1024] and control > len(head[:1024]) // 20 and not _looks_utf16(head):
        raise DataError("this is a binary file, not text", "check the path", at=at)


def _looks_utf16(head: bytes) -> bool:
    sample = head[:1024]
    return (
        sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        or max(sample[0::2].count(0), sample[1::2].count(0)) > len(sample) // 4
    )


def _other_encoding(raw: bytes) -> str:
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    chinese = sum("\u4e00" <= char <= "\u9fff" for char in text)
    return "; it reads as GBK / GB18030" if chinese * 4 > len(text) else ""


def _table_encoding(path: Path) -> str:
    """utf-8-sig or gb18030, by reading the table once: Chinese spreadsheets often export the latter."""
    with _open(path) as file:
        _refuse_other_kinds(str(path), file.readline(1 << 16))
    for encoding in ("utf-8-sig", "gb18030"):
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            odd = letters = 0
            with _open(path) as file:
                while piece := file.read(1 << 20):
                    text = decoder.decode(piece)
                    if encoding == "utf-8-sig" or text.isascii():
                        continue
                    foreign = [char for char in text if char > "\x7f"]
                    letters += len(foreign)
                    odd += len(foreign) - len("".join(foreign).encode("gb2312", "ignore")) // 2
                decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            continue
        # GB18030 gives some character to nearly every byte: only everyday Chinese (GB 2312) speaks for it
        if encoding == "utf-8-sig" or odd <= letters // 10:
            return encoding
    raise DataError("neither UTF-8 nor GB18030", "save the table as UTF-8", at=str(path))


# -- JSON --------------------------------------------------------------------------------------------------


class _NotJson(DataError):
    """A DataError that knows the line inside the text it was given."""

    line: int | None = None


def parse_json(text: str) -> Any:
    """A JSON value: no key twice, no NaN, of bounded parts. Raises DataError without a position."""
    if _has_many_parts(text):
        raise _NotJson(
            f"more than {_MOST_PARTS:,} lists and objects in one record", "a record is an object of texts"
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
    return len(text) > _MOST_PARTS and text.count("[") + text.count("{") > _MOST_PARTS


class _DuplicateKey(Exception):
    hint = "keep one of them"


class _Constant(Exception):
    hint = "write null or leave the field out"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys, seen = [key for key, _ in pairs], set()
        place = next(place for place, key in enumerate(keys) if key in seen or seen.add(key))
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


# -- paths -------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str | None:
    """The ending that decides how a file is read; None for one that is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _access(path: Path) -> bool:
    """Whether something is there.

    Raises:
        DataError: a folder on the way to it does not let us see.
    """
    try:
        return path.exists()
    except OSError as problem:
        raise DataError(
            f"{problem.strerror or type(problem).__name__}", "check the path", at=str(path)
        ) from None


def _looks_like_hub_name(source: str) -> bool:
    return is_hub_name(source.partition(":")[0]) and not Path(source).suffix


def _nearest(path: Path) -> str:
    from medicalgpt_cli.settings.fields import did_you_mean

    if near := nearest_path(str(path)):
        return f"did you mean {near}?"
    folder = path.parent if path.parent.is_dir() else None
    near = did_you_mean(path.name, [file.name for file in folder.iterdir()]) if folder else None
    return f"did you mean {folder / near}?" if near else "check the path"


def _first_character(path: Path, file: IO[bytes]) -> bytes:
    head = file.read(4096)
    return head.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1]
