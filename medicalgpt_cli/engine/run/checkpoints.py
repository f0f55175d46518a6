"""Checkpoints that can be trusted: each is written beside, hashed, synced and renamed, and proved on reading.

A checkpoint is `checkpoint-<step>/` with a `complete.json` that names every file, its size and its SHA-256.
One without it, or with a file that differs, is not a checkpoint, whatever its number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from medicalgpt_cli.engine.run.files import (
    PRIVATE,
    TEMPORARY,
    atomic_write,
    fsync_path,
    fsync_tree,
    remove_tree,
    set_modes,
    sha256_file,
)

SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path | str) -> int | None:
    """The training step in a checkpoint's name; None for any other folder."""
    match = _NAME.fullmatch(Path(checkpoint).name)
    return int(match.group(1)) if match else None


def seal(folder: Path) -> None:
    """Write down what is in a folder, every file with its size and hash, for `problem` to prove."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != SEAL
    }
    atomic_write(folder / SEAL, json.dumps({"format": 1, "files": files}, indent=1) + "\n")


def publish(temporary: Path | str, final: Path | str) -> Path:
    """Hash every file of `temporary`, sync it and give it its final name.

    A checkpoint of the same step gives way: a resumed run reaches that step again only where the earlier
    one was damaged or came from beyond the step that it went on from.
    """
    temporary, final = Path(temporary), Path(final)
    seal(temporary)
    set_modes(temporary, PRIVATE)
    fsync_tree(temporary)
    if final.exists():
        _discard(final)
    temporary.rename(final)
    fsync_path(final.parent)
    return final


def problem(checkpoint: Path | str, needed: Collection[str] = ()) -> str | None:
    """Why a folder is not a complete checkpoint, in a few words; None where it is one.

    Args:
        needed: files that have to be there.
    """
    checkpoint = Path(checkpoint)
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"it has no valid {SEAL}"
    present = {  # hidden files come from whoever has looked at the folder
        file.relative_to(checkpoint).as_posix()
        for file in checkpoint.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    unnamed = sorted((present | set(needed)) - {SEAL} - expected.keys())
    if unnamed or not expected:
        return f"{SEAL} does not name {unnamed[0] if unnamed else 'any file'}"
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or sha256_file(file) != digest:
            return f"{name} is damaged"
    return None


def newest_complete(folder: Path | str) -> Path | None:
    """The complete checkpoint of the highest step, every hash checked; None if there is none."""
    for checkpoint in reversed(_all(folder)):
        if problem(checkpoint) is None:
            return checkpoint
    return None


def incomplete(folder: Path | str) -> dict[str, str]:
    """Names of the folders that look like checkpoints and are none, with the reason, for a notice."""
    found = {checkpoint.name: problem(checkpoint) for checkpoint in _all(folder)}
    return {name: reason for name, reason in found.items() if reason}


def prune(folder: Path | str, keep: int, protect: Collection[Path | str] = ()) -> None:
    """Delete all but the `keep` newest checkpoints and those to `protect`, and what killed saves left."""
    folder = Path(folder)
    protected = {Path(one).name for one in protect}
    for checkpoint in _all(folder)[: -keep if keep else None]:
        if checkpoint.name not in protected:
            _discard(checkpoint)
    for left in folder.glob(f"*{TEMPORARY}"):
        remove_tree(left)


def drop_after(folder: Path | str, step: int) -> None:
    """Delete checkpoints beyond `step`: a run that goes on from `step` writes them anew."""
    for checkpoint in _all(folder):
        if step_of(checkpoint) > step:
            _discard(checkpoint)


def _all(folder: Path | str) -> list[Path]:
    """Folders named like checkpoints, by step."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((one for one in folder.iterdir() if one.is_dir() and step_of(one) is not None), key=step_of)


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint in such an order that a kill on the way never leaves half of one under its name."""
    aside = checkpoint.with_name(f"old-{checkpoint.name}{TEMPORARY}")
    remove_tree(aside)
    checkpoint.rename(aside)
    remove_tree(aside)
