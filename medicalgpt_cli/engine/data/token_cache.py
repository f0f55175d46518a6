"""A folder of the user's cache that holds the token ids of a source: proved when it is opened, else written anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from medicalgpt_cli.engine.data.readers import HubDataset
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import checkpoints
from medicalgpt_cli.engine.run.files import PRIVATE, private_folder, remove_tree, staged
from medicalgpt_cli.errors import DataError

_Opened = TypeVar("_Opened")
META = "meta.json"  # names the key under which the folder was written


def cached(
    place: Path,
    key: Callable[[], str],
    parts: Sequence[str],
    source: str,
    files: Sequence[Path | HubDataset],
    write: Callable[[Path, str], None],
    opened: Callable[[Path], _Opened],
    observer: Observer,
) -> _Opened:
    """The folder of a source under its key, as it was sealed.

    Args:
        place: where all such folders lie. key: the name of this one; reads the files. parts: the files in it.
        source: as a person named it. write: fills a new folder; gets the key, too. opened: opens the folder.

    Raises:
        DataError: a file of the source cannot be read.
    """
    private_folder(place)
    try:
        folder = place / key()
    except OSError as problem:
        raise DataError(
            f"{problem.strerror or type(problem).__name__}", "check the path", at=str(problem.filename)
        ) from None
    damage = (
        _damage(folder, parts) if folder.is_dir() else None
    )  # outside the lock: several processes look at once
    with FileLock(f"{folder}.lock", mode=0o600):
        if damage and (damage := _damage(folder, parts)):  # unless another process has mended it
            observer.on_warning(f"the token cache of {source} is made anew: {damage}")
            remove_tree(folder)
        if any(isinstance(file, HubDataset) for file in files):  # which can change without its name
            remove_tree(folder)
        if not folder.is_dir():
            with staged(folder, PRIVATE) as new:
                write(new, folder.name)
        return opened(folder)


def _damage(folder: Path, parts: Sequence[str]) -> str | None:
    """Why a folder is not what was written under its key, in a few words; None where it is."""
    found = checkpoints.problem(folder, (META, *parts))
    if found is None and json.loads((folder / META).read_text(encoding="utf-8"))["key"] != folder.name:
        return "it belongs to other data"
    return found
