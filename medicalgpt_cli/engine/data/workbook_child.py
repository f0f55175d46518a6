"""Read a workbook: `workbook_child.py FILE [SHEET]`, within limits, as JSON lines.

A script of its own, that imports nothing of medgpt (engine/run/bounded.py): a small file can stand for gigabytes.
The first line is about the sheets, each further one is a row of the sheet that is read: [number, [texts]].
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

NO_WORKBOOK = 65
LONG_RECORD = 66
LOCKED = 67
_SPANNED = re.compile(rb"number-(rows|columns)-spanned=.([2-9]|1[0-9])")
_LONGEST = 64 * 1024 * 1024  # bytes of a row


def main(path: str, wanted: str | None) -> None:
    import python_calamine as calamine

    try:
        book = calamine.CalamineWorkbook.from_path(path)
        about = [one for one in book.sheets_metadata if one.typ == calamine.SheetTypeEnum.WorkSheet]
        sheets = [book.get_sheet_by_name(one.name) for one in about]
        hidden = [one.visible != calamine.SheetVisibleEnum.Visible for one in about]
        rows = [sum(any(_text(one).strip() for one in row) for row in sheet.iter_rows()) for sheet in sheets]
    except calamine.PasswordError:
        sys.exit(LOCKED)
    except (calamine.CalamineError, OSError, ValueError):
        sys.exit(NO_WORKBOOK)
    except BaseException as problem:
        if type(problem).__name__ == "PanicException":  # the library's own, no Exception: over a damaged file
            sys.exit(NO_WORKBOOK)
        raise
    names = [one.name for one in about]
    read = _choose(names, rows, hidden, wanted)
    sheet = sheets[read] if read is not None else None
    tall, wide = _merged(sheet) if sheet is not None else ({}, [])
    head = {
        "sheets": list(zip(rows, hidden, strict=True)),
        "names": names,
        "read": None if read is None else read + 1,
        "wide": wide,
        "filled": len(tall),
        "unknown_merges": sheet is not None and sheet.merged_cell_ranges is None and _has_merges(path),
    }
    print(json.dumps(head), flush=True)
    if sheet is not None:
        for number, cells in _rows(sheet, tall):
            line = json.dumps([number, cells])
            if len(line) > _LONGEST:
                sys.exit(LONG_RECORD)
            print(line)


def _choose(names: list[str], rows: list[int], hidden: list[bool], wanted: str | None) -> int | None:
    """Which sheet is read: by name, by number, or the first that is shown and holds something, else the first one."""
    if wanted is None:
        shown = [place for place in range(len(names)) if rows[place] and not hidden[place]]
        full = [place for place in range(len(names)) if rows[place]]
        return next(iter([*shown, *full]), None)
    if wanted in names:
        return names.index(wanted)
    return int(wanted) - 1 if wanted.isdecimal() and 0 < int(wanted) <= len(names) else None


def _merged(sheet: Any) -> tuple[dict[tuple[int, int], int], list[tuple[int, int]]]:
    """Cells that are merged over rows: (first row, column) to the last row, from 0; and the rows, from 1, of cells
    that are merged over columns."""
    tall, wide = {}, []
    for (top, left), (bottom, right) in sheet.merged_cell_ranges or ():
        if right > left:
            wide.append((top + 1, bottom + 1))
        elif bottom > top:
            tall[top, left] = bottom
    return tall, wide


def _has_merges(path: str) -> bool:
    """Whether an OpenDocument spreadsheet has merged cells anywhere, of which the library does not say where."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("content.xml") as content:
            kept = b""
            while piece := content.read(1 << 20):
                if _SPANNED.search(kept + piece):
                    return True
                kept = piece[-64:]
    except (KeyError, zipfile.BadZipFile):  # no OpenDocument file
        pass
    return False


def _rows(sheet: Any, tall: dict[tuple[int, int], int]) -> Iterator[tuple[int, list[str]]]:
    if sheet.start is None:
        return
    left = sheet.start[1]
    going: dict[int, tuple[int, str]] = {}  # column: the last row of its merged cell, and its text
    for row, values in enumerate(sheet.iter_rows()):
        cells = [_text(value) for value in values]
        if any(cells):  # a row that holds nothing of its own stays empty
            for place in [place for place in going if going[place][0] < row]:
                del going[place]
            for place, text in enumerate(cells):
                if last := tall.get((row, left + place)):
                    going[place] = (last, text)
                elif place in going and not text:
                    cells[place] = going[place][1]
        yield row + 1, cells


def _text(value: Any) -> str:
    """A cell as text, always the same: 12 and not 12.0, dates as ISO 8601, truth values as true and false."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e21 else format(value, ".15g")
    if isinstance(value, datetime.datetime):
        value += datetime.timedelta(
            microseconds=500_000
        )  # days are fractions in the file: 08:30 can be 08:29:59.9999
        value = value.replace(microsecond=0)
        midnight = value.time() == datetime.time()
        return value.date().isoformat() if midnight else value.isoformat(sep=" ")
    if isinstance(value, datetime.timedelta):
        seconds = round(value.total_seconds())
        return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    if isinstance(value, datetime.time):
        return value.isoformat(timespec="seconds")
    return value.isoformat() if isinstance(value, datetime.date) else str(value)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
