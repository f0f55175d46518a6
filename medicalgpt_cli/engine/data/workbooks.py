"""The sheets of a workbook as records. A child process reads them: a small workbook can stand for gigabytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from medicalgpt_cli.engine.data import limits, workbook_child
from medicalgpt_cli.engine.data.containers import must_be_a_file
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.engine.data.tables import Record, records_of
from medicalgpt_cli.engine.run import bounded
from medicalgpt_cli.errors import DataError, MedgptError, UnsafeRefused
from medicalgpt_cli.settings.fields import did_you_mean


def workbook_records(
    path: Path, reading: ReadOptions = AS_FOUND, notices: list[str] | None = None
) -> Iterator[tuple[int, Any]]:
    """(row, object) of each record of one sheet: the one that `--sheet` names, or the first with data.

    Read by a child process that may use only so much memory. Numbers have the up to 15 digits that a spreadsheet
    shows, dates are ISO 8601, formulas are their last values. A cell that is merged over several rows counts in each.

    Raises:
        DataError: no workbook, a locked one, no such sheet, cells merged over columns, or what `records_of` refuses.
        UnsafeRefused: it unpacks to more than it may.
    """
    with _Workbook(path, reading.sheet) as book:
        book.say_which(notices)
        yield from records_of(book.rows(), path, notices)


class _Workbook(contextlib.AbstractContextManager["_Workbook"]):
    """The child process that reads a workbook: what it says about its sheets, then the rows of one."""

    def __init__(self, path: Path, sheet: str | None):
        must_be_a_file(path)
        self.path, self.sheet = path, sheet
        self.packed = path.stat().st_size
        self.memory = limits.CHILD_MEMORY + 20 * self.packed
        self.child = bounded.start(
            Path(workbook_child.__file__), [str(path), *([sheet] if sheet else [])], memory=self.memory
        )
        assert self.child.stdout is not None
        self.lines: IO[bytes] = self.child.stdout
        self.about: dict[str, Any] = {}

    def __enter__(self) -> _Workbook:
        try:
            line = self.lines.readline()
            if not line:
                self._refuse(self.child.wait())
            self.about = json.loads(line)
            if self.about["read"] is None:
                self._refuse_sheet()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.communicate()

    def rows(self) -> Iterator[Record]:
        wide = {row for first, last in self.about["wide"] for row in range(first, last + 1)}
        size = 0
        for line in self.lines:
            size += len(line)
            if size > max(limits.CHILD_UNPACKED, limits.CHILD_RATIO * self.packed):
                raise UnsafeRefused(
                    f"{self.path}: it unpacks to more than {limits.CHILD_RATIO:,} times its size",
                    "look at it first",
                )
            row, cells = json.loads(line)
            if row in wide:
                raise DataError(
                    "cells are merged over several columns: which one they belong to is not known",
                    "undo the merge; a title above the table has to go",
                    at=f"{self.path}:{row}",
                )
            yield row, cells
        if code := self.child.wait():
            self._refuse(code)

    def say_which(self, notices: list[str] | None) -> None:
        if notices is None:
            return
        sheets, read = self.about["sheets"], self.about["read"]
        others = [
            f"sheet {number} ({rows:,} rows{', hidden' if hidden else ''})"
            for number, (rows, hidden) in enumerate(sheets, 1)
            if rows and number != read
        ]
        if others:
            notices.append(
                f"{self.path}: sheet {read} of {len(sheets)} is read; left out: {', '.join(others)}; "
                "--sheet NAME reads another one"
            )
        elif len(sheets) > 1:
            notices.append(f"{self.path}: sheet {read} of {len(sheets)} is read, the others are empty")
        if self.about["unknown_merges"]:
            notices.append(
                f"{self.path}: cells are merged, and each counts where it begins only; saved as .xlsx they would "
                "count in each row"
            )
        if self.about["filled"]:
            notices.append(
                f"{self.path}: {self.about['filled']:,} cells that are merged over rows count in each row"
            )

    def _refuse_sheet(self) -> None:
        names = self.about["names"]
        if self.sheet is None:
            return  # no sheet holds anything
        near = did_you_mean(self.sheet, names)
        raise DataError(
            f"there is no sheet {self.sheet} in it",
            f"did you mean {near}?" if near else f"its sheets also have numbers: 1 to {len(names)}",
            at=str(self.path),
        )

    def _refuse(self, code: int) -> None:
        if code == workbook_child.LOCKED:
            raise DataError("the workbook is locked with a password", "save it without", at=str(self.path))
        if code == workbook_child.NO_WORKBOOK:
            raise DataError(
                "not a workbook, or a damaged one", "can a spreadsheet open it?", at=str(self.path)
            )
        if code == workbook_child.LONG_RECORD:
            raise DataError(
                f"a row of more than {limits.LONGEST_RECORD // 2**20} MiB", "cut it into several",
                at=str(self.path),
            )  # fmt: skip
        if code == 1:
            raise MedgptError(
                f"{self.path}: the program that reads it failed",
                "save the sheet as .csv; and please report it",
            )
        raise UnsafeRefused(
            f"{self.path}: it takes more than {bounded.why_ended(code, memory=self.memory)} to unpack",
            "save the sheet as .csv",
        )
