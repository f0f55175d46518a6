"""Tables to records: a header's rules, and `.csv` and `.tsv` files; workbooks.py has the sheets of a workbook.

A record is an object of texts, one for each named column. Empty rows are left out and counted.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from medicalgpt_cli.engine.data import limits
from medicalgpt_cli.engine.data.encodings import open_utf8
from medicalgpt_cli.engine.data.known_keys import is_known
from medicalgpt_cli.engine.data.lines import raw_lines
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.errors import DataError

_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_SAMPLE_LINES, _SAMPLE_SIZE = 200, 1 << 20  # lines and characters from which the delimiter is found
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"

Record = tuple[int, list[str]]  # its line, or its row in a sheet; its cells


def records_of(records: Iterable[Record], path: Path, notices: list[str] | None) -> Iterator[tuple[int, Any]]:
    """(line, object) of each record behind the header, which is the first record that is not empty.

    Raises:
        DataError: two columns have one name, a column with values has none, or a row has another number of cells.
    """
    names: list[str] = []
    empty = repeated = 0
    for line, cells in records:
        if not any(cell.strip() for cell in cells):
            empty += len(cells) > 0 and bool(names)  # a blank line is no row
            continue
        if not names:
            names = _header(cells, f"{path}:{line}")
            continue
        if len(names) > 1 and _trimmed(cells) == names:  # tables that were joined
            repeated += 1
            continue
        if len(cells) != len(names):
            raise DataError(
                f"{len(names)} columns were expected, this row has {len(cells)}",
                "a text with the delimiter or line ends has to stand in double quotes",
                at=f"{path}:{line}",
            )
        unnamed = [place for place, name in enumerate(names) if not name and cells[place].strip()]
        if unnamed:
            raise DataError(
                f"column {unnamed[0] + 1} holds a value here and has no name in the header",
                "the first row names every column: name it, or empty it",
                at=f"{path}:{line}",
            )
        yield line, {name: cell for name, cell in zip(names, cells, strict=True) if name}
    for number, word in ((empty, "are empty"), (repeated, "repeat the header")):
        if number and notices is not None:
            notices.append(f"{path}: {number:,} rows {word} and are left out")


def _header(cells: Sequence[str], at: str) -> list[str]:
    """The columns' names without white space around them, full-width too; "" for a column without one."""
    names = _trimmed(cells)
    if len(names) > limits.MOST_COLUMNS:
        raise DataError(f"more than {limits.MOST_COLUMNS:,} columns", "is it a table?", at=at)
    first: dict[str, int] = {}
    for place, name in enumerate(names, 1):
        before = first.setdefault(name, place)
        if name and before < place:
            both = f"columns {before} and {place} have the same name"
            raise DataError(
                f"{both}, {name}" if is_known(name) else both, "rename one of them, or remove it", at=at
            )
    return names


def _trimmed(cells: Sequence[str]) -> list[str]:
    return [cell.strip().strip(_INVISIBLE).strip() for cell in cells]


# -- delimited text ----------------------------------------------------------------------------------------


def delimited_records(
    path: Path, own: str, reading: ReadOptions = AS_FOUND, notices: list[str] | None = None
) -> Iterator[tuple[int, Any]]:
    """The records of a `.csv` or `.tsv` file. Its delimiter is found, and named where it is not `own`."""
    with open_utf8(path, reading, notices) as file:
        head = _head(_TableLines(path, file))
    delimiter, stated = find_delimiter(head, own, str(path))
    if delimiter != own and notices is not None:
        notices.append(f"{path}: columns are divided by {_NAMES.get(delimiter, delimiter)}")
    csv.field_size_limit(limits.LONGEST_RECORD)
    with open_utf8(path, reading) as file:
        lines = _TableLines(path, file)
        reader = csv.reader(itertools.islice(lines, int(stated), None), delimiter=delimiter, strict=True)
        try:
            yield from records_of(_counted(reader, lines), path, notices)
        except csv.Error as problem:
            raise DataError(
                f"not a valid table ({problem})", "check the quotes", at=f"{path}:{lines.number}"
            ) from None


def _head(lines: Iterable[str]) -> list[str]:
    """The first lines, as many as the delimiter is found from."""
    found, size = [], 0
    for line in itertools.islice(lines, _SAMPLE_LINES):
        found.append(line)
        size += len(line)
        if size > _SAMPLE_SIZE:
            break
    return found


def find_delimiter(lines: Sequence[str], own: str, name: str) -> tuple[str, bool]:
    """What divides the columns of a table, and whether a first line `sep=;` states it.

    Taken is what gives the header at least two columns, and every record as many; `own`, the ending's, where it does.
    A table of one column stays one: nothing divides it.

    Args:
        lines: the first ones of the table.

    Raises:
        DataError: two other delimiters would do.
    """
    stated = re.fullmatch(r"sep=([,;\t|])\s*", lines[0].removeprefix("\ufeff")) if lines else None
    if stated:
        return stated[1], True
    fitting = [one for one in _NAMES if _divides(lines, one)]
    if own in fitting or not fitting:
        return own, False
    if len(fitting) > 1:
        both = " or ".join(_NAMES[one] for one in fitting)
        raise DataError(f"its columns could be divided by {both}", "write it with commas", at=name)
    return fitting[0], False


def _divides(lines: Sequence[str], delimiter: str) -> bool:
    """Whether the header has several columns with this delimiter, and every record of the sample as many."""
    widths: list[int] = []
    try:
        for record in csv.reader(lines, delimiter=delimiter, strict=True):
            if record:
                widths.append(len(record))
    except csv.Error:
        pass  # perhaps only because the sample ends within quotes; reading says what is wrong
    return bool(widths) and widths[0] > 1 and set(widths) == {widths[0]}


def _counted(reader: Any, lines: _TableLines) -> Iterator[Record]:
    for cells in reader:
        lines.size = 0
        yield lines.number, cells


class _TableLines:
    """The lines of a table, for the csv module, which would take a record of any length."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path = path
        self.number = self.size = 0  # lines so far; characters of the record so far
        self.lines = self._split(raw_lines(file, str(path)))

    def __iter__(self) -> _TableLines:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.size += len(line)
        if self.size > limits.LONGEST_RECORD:
            raise DataError(
                f"a record of more than {limits.LONGEST_RECORD // 2**20} MiB",
                "is a double quote missing?",
                at=f"{self.path}:{self.number}",
            )
        return line

    def _split(self, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
        """A carriage return alone ends a line, too: so old programs for the Mac write tables."""
        for _, text in lines:
            for line in re.split(r"(?<=\r)(?!\n)", text) if "\r" in text[:-2] else (text,):
                if line:
                    self.number += 1
                    yield line
