"""Answers on disk: each is safe as soon as it is there, and the file gets its name when all are.

While a run goes on, rows stand in `<file>.partial`, one JSON line each behind a header line that says which
questions, model and settings they belong to. A killed run goes on behind the last whole line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medicalgpt_cli.engine.run.files import atomic_write, fsync_path, open_private
from medicalgpt_cli.errors import UsageError

_FORMAT = "medgpt-predictions-1"


class PredictionFile:
    """The rows of one run of `infer`, by the number of the question."""

    def __init__(self, path: Path, identity: Mapping[str, str], *, resume: bool, overwrite: bool):
        """Begin, or take up what an interrupted run has left.

        Args:
            identity: what has to be the same for a resume, under the names that a user knows.

        Raises:
            UsageError: the file exists, another process writes it, or the interrupted run was another one.
        """
        if path.suffix not in (".json", ".jsonl"):
            raise UsageError(
                f"--predictions-file {path}: the ending decides the format", "name it .json or .jsonl"
            )
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.rows: dict[int, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(path)
        try:
            self._begin(identity, resume, overwrite)
        except BaseException:
            self._unlock()
            raise
        self._file = open_private(self.partial, "ab")

    def _begin(self, identity: Mapping[str, str], resume: bool, overwrite: bool) -> None:
        if resume and self.partial.exists():
            self._take_up(identity)
            return
        if self.path.exists() and not overwrite:
            word = "it is complete; nothing is left to do" if resume else "nothing is overwritten unasked"
            raise UsageError(f"{self.path} exists already ({word})", "name another file, or add --overwrite")
        if not overwrite and self.partial.exists() and self.partial.read_bytes().count(b"\n") > 1:
            raise UsageError(
                f"{self.partial} is left from an interrupted run", "go on with --resume, or --overwrite"
            )
        header = {"format": _FORMAT, "replaces": self.path.exists(), "identity": dict(identity)}
        atomic_write(self.partial, _line(header))

    def _take_up(self, identity: Mapping[str, str]) -> None:
        whole, length = [], 0
        for raw in self.partial.read_bytes().splitlines(keepends=True):
            entry = _whole(raw)
            if entry is None:  # torn by a kill or a power cut
                break
            whole.append(entry)
            length += len(raw)
        header = whole[0] if whole else {}
        if header.get("format") != _FORMAT:
            raise UsageError(f"{self.partial} is not an interrupted run of medgpt", "--overwrite starts anew")
        before = header["identity"]
        changed = [name for name, value in identity.items() if before.get(name) != value]
        if changed:
            raise UsageError(
                f"{self.partial} belongs to another run: {', '.join(changed)} changed",
                "give the same options to go on, or --overwrite to start anew",
            )
        self.rows = {entry["number"]: entry["row"] for entry in whole[1:]}
        # Killed between its last two steps, a run leaves the finished file and the partial one.
        if self.path.exists() and not header["replaces"] and self.path.read_bytes() != self._content():
            raise UsageError(
                f"{self.path} was written by something else", "name another file, or --overwrite"
            )
        os.truncate(self.partial, length)

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
        atomic_write(self.path, self._content())
        self.partial.unlink()
        fsync_path(self.path.parent)
        self._unlock()
        return self.path

    def close(self) -> None:
        """Leave what there is for a later `--resume`."""
        self._file.close()
        if not self.rows:
            self.partial.unlink(missing_ok=True)
        self._unlock()

    def _content(self) -> bytes:
        ordered = [self.rows[number] for number in sorted(self.rows)]
        if self.path.suffix == ".jsonl":
            return b"".join(map(_line, ordered))
        return (json.dumps(ordered, ensure_ascii=False, indent=1) + "\n").encode("utf-8")

    def _unlock(self) -> None:
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                Path(self._lock.lock_file).unlink()
            self._lock.release()


@dataclass
class StandardOutput:
    """JSON lines on standard output, in the order of the questions, each as soon as all before it are there."""

    rows: dict[int, dict[str, Any]]
    written: int = 0

    def add(self, number: int, row: dict[str, Any]) -> None:
        self.rows[number] = row
        while self.written in self.rows:
            line = json.dumps(self.rows[self.written], ensure_ascii=False) + "\n"
            sys.stdout.buffer.write(line.encode("utf-8"))  # whatever the locale
            self.written += 1
        sys.stdout.buffer.flush()

    def sync(self) -> None: ...

    def close(self) -> None: ...

    def finish(self) -> str:
        return "-"


def _locked(path: Path) -> FileLock:
    lock = FileLock(path.with_name(f".{path.name}.lock"), mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another process is writing {path}", "wait for it, or name another file") from None
    return lock


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"


def _whole(raw: bytes) -> dict[str, Any] | None:
    """The entry of a line, or None for one that is not whole."""
    if not raw.endswith(b"\n"):
        return None
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
