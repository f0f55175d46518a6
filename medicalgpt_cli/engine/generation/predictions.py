"""Answers on disk: each is safe as soon as it is there, and the file gets its name when all are.

While a run goes on, rows stand in `<file>.partial`, one JSON line each behind a header line that says which
questions, model and settings they belong to. A killed run goes on behind the last whole line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.run.files import atomic_write, fsync_path
from medicalgpt_cli.errors import UsageError

_FORMAT = "medgpt-predictions-1"


class PredictionFile:
    """The rows of one run of `infer`, by the number of the question."""

    def __init__(self, path: Path, identity: dict[str, str], *, resume: bool, overwrite: bool):
        """Begin, or take up what an interrupted run has left.

        Args:
            identity: what has to be the same for a resume: fingerprints of questions, model and settings.

        Raises:
            UsageError: the file exists, or the interrupted run was another one.
        """
        if path.suffix not in (".json", ".jsonl"):
            raise UsageError(
                f"--predictions-file {path}: the ending decides the format", "name it .json or .jsonl"
            )
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.rows: dict[int, dict[str, Any]] = {}
        if path.exists() and not overwrite:
            word = (
                "it is complete; nothing is left to do" if resume else "nothing is overwritten without a word"
            )
            raise UsageError(f"{path} exists already ({word})", "name another file, or add --overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.partial.exists():
            self._take_up(identity)
        elif self.partial.exists() and not overwrite:
            raise UsageError(
                f"{self.partial} is left from an interrupted run", "go on with --resume, or --overwrite"
            )
        else:
            atomic_write(self.partial, _line({"format": _FORMAT, **identity}))
        self._file = self.partial.open("ab")

    def _take_up(self, identity: dict[str, str]) -> None:
        whole = []
        for raw in self.partial.read_bytes().split(b"\n")[:-1]:  # a torn last line has no end
            try:
                whole.append(json.loads(raw))
            except ValueError:
                break
        header = whole[0] if whole else {}
        if header.get("format") != _FORMAT:
            raise UsageError(f"{self.partial} is not an interrupted run of medgpt", "--overwrite starts anew")
        changed = [name for name, value in identity.items() if header.get(name) != value]
        if changed:
            raise UsageError(
                f"{self.partial} belongs to another run: {', '.join(changed)} changed",
                "give the same options to go on, or --overwrite to start anew",
            )
        self.rows = {entry["number"]: entry["row"] for entry in whole[1:]}
        atomic_write(self.partial, b"".join(_line(entry) for entry in whole))

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Put an answer on the disk."""
        self.rows[number] = row
        self._file.write(_line({"number": number, "row": row}))
        self._file.flush()

    def sync(self) -> None:
        """After this, what was added survives a power cut."""
        os.fsync(self._file.fileno())

    def finish(self) -> Path:
        """Write all rows in the order of the questions under the final name."""
        self._file.close()
        ordered = [self.rows[number] for number in sorted(self.rows)]
        if self.path.suffix == ".jsonl":
            atomic_write(self.path, b"".join(map(_line, ordered)))
        else:
            atomic_write(self.path, json.dumps(ordered, ensure_ascii=False, indent=1) + "\n")
        self.partial.unlink()
        fsync_path(self.path.parent)
        return self.path

    def close(self) -> None:
        self._file.close()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"
