"""What a source of data is, and the rows of each kind of file; a clear word about each that is not read.

A row keeps its file and line, so that whatever is wrong with it later can be named. No message quotes what a
row says: it may be about a patient. How the kinds are read: json_records, lines, tables, workbooks, parquet_records,
documents; which encoding a text has: encodings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data import documents
from medicalgpt_cli.engine.data.containers import COMPRESSIONS, must_be_a_file
from medicalgpt_cli.engine.data.folders import FolderFiles
from medicalgpt_cli.engine.data.json_records import json_records, parse_json
from medicalgpt_cli.engine.data.lines import Wrong, documents_of_text, text_lines, unit_of
from medicalgpt_cli.engine.data.parquet_records import parquet_records
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.engine.data.tables import delimited_records
from medicalgpt_cli.engine.data.workbooks import workbook_records
from medicalgpt_cli.engine.run.hub_names import is_hub_name, nearest_path
from medicalgpt_cli.errors import DataError, UsageError

__all__ = [
    "AS_FOUND", "HubDataset", "ReadOptions", "Row", "check_text_unit", "expand_sources", "is_document", "is_text",
    "must_be_a_file", "parse_json", "read_again", "read_as", "read_rows", "renamed", "text_lines", "unit_of",
]  # fmt: skip

_JSON = (".jsonl", ".ndjson", ".json")
_DELIMITED = {".csv": ",", ".tsv": "\t"}
_WORKBOOKS = (".xlsx", ".xlsm", ".xls", ".ods")
_TEXT = (".txt", ".md")
_PACKABLE = (*_JSON, *_DELIMITED, *_TEXT)
SUFFIXES = (*_JSON, *_DELIMITED, *_WORKBOOKS, ".parquet", *_TEXT, *documents.SUFFIXES)
_INSTEAD = {
    ".xml": "XML says in its own way what is text: write the texts as .txt or .jsonl",
    ".doc": "save it as .docx",
    ".rtf": "save it as .docx",
    ".wps": "save it as .docx",
    ".odt": "save it as .docx",
    ".ppt": "save it as .pptx",
    ".et": "save it as .xlsx",
    ".xlsb": "save it as .xlsx",
    ".numbers": "save it as .xlsx",
}


@dataclass(frozen=True)
class Row:
    """One record: `value` is an object of a JSON file, a table row, or a piece of text."""

    path: str
    line: int  # the line in a text file, the row of a sheet, the record's number in an array; from 1
    value: Any

    @property
    def at(self) -> str:
        return f"{self.path}:{self.line}"


_NO_DATA = ("dataset_info.json",)  # what a folder's data sets are, in LLaMA-Factory's words


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub, `owner/name` or `owner/name:split`."""

    name: str
    split: str


def expand_sources(
    sources: Sequence[str], notices: list[str] | None = None, *, with_documents: bool = False
) -> tuple[list[Path | HubDataset], list[str]]:
    """Files of the named files, folders and hub data sets, in a fixed order.

    Args:
        notices: takes a line for each thing worth knowing about a folder (`FolderFiles`).
        with_documents: whether documents (`.docx`, …) of a folder are wanted, whose only use is their text.

    Returns:
        The files, and the names of files in folders that are of no known kind, or not wanted.

    Raises:
        DataError: a path does not exist, a folder holds nothing that can be read, or a part of it cannot be.
    """
    found: list[Path | HubDataset] = []
    ignored: list[str] = []

    def wanted(file: Path) -> bool:
        known = _kind(file) is not None and file.name not in _NO_DATA
        return known and (with_documents or not is_document(file))

    for source in sources:
        path = Path(source)
        if _access(path) and path.is_dir():
            inside = FolderFiles(path)
            known = [file for file in inside.files if wanted(file)]
            ignored += [str(file) for file in inside.files if not wanted(file)]
            if notices is not None:
                notices += inside.notices(wanted)
            if not known:
                raise DataError(
                    f"{source}: no data file in this folder", f"known endings: {', '.join(SUFFIXES)}"
                )
            found += known
        elif path.exists():
            _check_kind(path)
            found.append(path)
        elif _looks_like_hub_name(source):
            name, _, split = source.partition(":")
            found.append(HubDataset(name, split or "train"))
        else:
            raise DataError(f"{source}: no such file or folder", _nearest(path))
    return found, ignored


def read_rows(
    source: Path | HubDataset,
    *,
    text_unit: str = "line",
    notices: list[str] | None = None,
    reading: ReadOptions = AS_FOUND,
    wrong: Wrong | None = None,
) -> Iterator[Row]:
    """The rows of one file, read as a stream, with the keys that `--columns` gives them.

    Args:
        text_unit: what a document of a text file is: "line", "block" (between blank lines) or "file".
        notices: takes a line for each thing worth knowing (an encoding other than UTF-8, a workbook's sheet).
        wrong: takes a broken line of a JSON file or a row that --columns cannot rename, so that the rest is read, too.

    Raises:
        DataError: what is wrong, with the file and line.
    """
    name = str(source) if isinstance(source, Path) else source.name
    _READ_AS[name] = reading
    for line, value in _records(source, text_unit, notices, reading, wrong):
        row = Row(name, line, value)
        try:
            renewed = renamed(row, reading.columns) if reading.columns else row
        except DataError as problem:
            if wrong is None:
                raise
            wrong(problem)
            continue
        yield renewed


def read_again(path: Path) -> Iterator[Row]:
    """The rows of a file in the way in which this program read it last, for a second look at all of them."""
    yield from read_rows(path, reading=read_as(path))


def read_as(path: Path) -> ReadOptions:
    """How this program read a file last."""
    return _READ_AS.get(str(path), AS_FOUND)


_READ_AS: dict[str, ReadOptions] = {}


def _records(
    source: Path | HubDataset,
    text_unit: str,
    notices: list[str] | None,
    reading: ReadOptions,
    wrong: Wrong | None,
) -> Iterator[tuple[int, Any]]:
    if isinstance(source, HubDataset):
        return _hub_records(source)
    kind = _kind(source)
    if kind == ".parquet":
        return parquet_records(source)
    if kind in _DELIMITED:
        return delimited_records(source, _DELIMITED[kind], reading, notices)
    if kind in _WORKBOOKS:
        return workbook_records(source, reading, notices)
    if kind in _TEXT:
        return documents_of_text(source, text_unit, reading, notices)
    if kind in documents.SUFFIXES:
        return iter([(1, documents.document_text(source, reading, notices))])
    _check_kind(source, known=False)
    return json_records(source, kind == ".json", reading, notices, wrong)


def renamed(row: Row, columns: Sequence[tuple[str, str]]) -> Row:
    """The row with the keys that `--columns` gives it; a column that it does not have changes nothing.

    Raises:
        DataError: it has a key of the new name already.
    """
    if not isinstance(row.value, dict):
        return row
    new = {old: key for key, old in columns if old in row.value}
    for old, key in new.items():
        if key in row.value and key not in new:
            raise DataError(
                f"--columns {key}={old}: the record has a key {key} of its own",
                f"rename it in the file, or give it another meaning, too: --columns KEY={key}",
                at=row.at,
            )
    return Row(row.path, row.line, {new.get(key, key): value for key, value in row.value.items()})


def is_text(source: Path | HubDataset) -> bool:
    """Whether a source is a plain text file, whose documents are a matter of `text_unit`."""
    return isinstance(source, Path) and _kind(source) in _TEXT


def is_document(source: Path | HubDataset) -> bool:
    """Whether a source is a `.docx`, `.pptx`, `.pdf` or web page, which is text and nothing else."""
    return isinstance(source, Path) and _kind(source) in documents.SUFFIXES


def is_workbook(source: Path | HubDataset) -> bool:
    """Whether a source is a workbook, which can have several sheets."""
    return isinstance(source, Path) and _kind(source) in _WORKBOOKS


def has_encoding(source: Path | HubDataset) -> bool:
    """Whether a source is text, whose encoding is a question."""
    return isinstance(source, Path) and _kind(source) in (*_PACKABLE, ".html", ".htm", None)


def check_text_unit(sources: Sequence[str], text_unit: str) -> None:
    """
    Raises:
        UsageError: a `--text-unit` is asked for, and none of the sources is a text file.
        DataError: a source is missing.
    """
    if text_unit == "auto":
        return
    files, _ = expand_sources(sources, with_documents=True)
    if not any(is_text(file) for file in files):
        raise UsageError(
            f"--text-unit {text_unit}: {sources[0]} has its documents as records",
            "leave it out: it is about .txt and .md files",
        )


def _hub_records(source: HubDataset) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        data = datasets.load_dataset(source.name, split=source.split)
    except Exception as problem:
        raise DataError(
            f"{source.name}: no such file, and the hub data set cannot be loaded ({type(problem).__name__})",
            "check the path; offline, only data sets that are in the cache can be used",
        ) from None
    yield from enumerate(data, 1)


def _kind(path: Path) -> str | None:
    """The ending that decides how a file is read; None for one that is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if packed:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (_PACKABLE if packed else SUFFIXES) else None


def _check_kind(path: Path, *, known: bool = True) -> None:
    """
    Args:
        known: whether an ending that nobody knows is refused, too.

    Raises:
        DataError: a file of its ending is not read.
    """
    ending = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if ending in COMPRESSIONS else ""
    if inner in SUFFIXES and inner not in _PACKABLE:
        raise DataError(f"{path}: {inner} files are packed already", f"unpack it: {Path(path.stem).name}")
    if ending in _INSTEAD:
        raise DataError(f"{path}: {ending} files are not read", _INSTEAD[ending])
    if known and _kind(path) is None:
        raise DataError(f"{path}: unknown ending", f"known endings: {', '.join(SUFFIXES)}, also .gz, .zst")


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
    return f"did you mean {folder / near}?" if folder and near else "check the path"
