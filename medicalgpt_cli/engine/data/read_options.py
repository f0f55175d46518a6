"""How a person says that files are to be read: encoding, sheet and names of columns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadOptions:
    """What `--encoding`, `--sheet` and `--columns` ask for; nothing is asked for by default."""

    encoding: str | None = None  # a name of `encodings.KNOWN`; found for each file where None
    sheet: str | None = None  # name or number of the sheet of a workbook; the first with data where None
    columns: tuple[tuple[str, str], ...] = ()  # (key, the column or key of the file that is meant by it)


AS_FOUND = ReadOptions()
