"""SHA-256 of large files, worked out once: a file that has not changed since is known by its place and times.

The cache is `fingerprints.json` in medgpt's home folder. A file is taken for unchanged while its device, inode, size,
mtime and ctime are the same, to the nanosecond: ctime cannot be set back by a program.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.environment import cache_folder
from medicalgpt_cli.engine.run.files import atomic_write

NAME = "fingerprints.json"
_MOST = 20_000  # files that are remembered; the oldest are forgotten
_SETTLED = (
    2.0  # seconds; what was written just now may be written again within one tick of the file system's clock
)
_PIECE = 1 << 24  # bytes read together
_WORTH_SAYING = 1 << 28  # bytes; less is hashed within a second


def fingerprint_files(
    files: Mapping[str, Path], observer: Observer | None = None, label: str = "the model"
) -> dict[str, dict[str, Any]]:
    """{name: {"bytes", "sha256"}} of some files. What has to be read is told to the observer.

    Raises:
        OSError: a file is not there or cannot be read.
    """
    known = _read()
    keys = {name: _key(path.stat()) for name, path in files.items()}
    new = {name: path for name, path in files.items() if keys[name] not in known}
    total = sum(path.stat().st_size for path in new.values())
    task = f"checking the files of {label} ({total / 1e9:.1f} GB, once)"
    said = observer if total >= _WORTH_SAYING else None
    if said:
        said.on_task_start(task, total, "bytes")
    found, done = {}, 0
    try:
        for name, path in new.items():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                began, now = os.fstat(file.fileno()), time.time()
                while piece := file.read(_PIECE):
                    digest.update(piece)
                    done += len(piece)
                    if said:
                        said.on_task_advance(task, done)
                ended = os.fstat(file.fileno())
            known[keys[name]] = digest.hexdigest()
            unchanged = _key(began) == _key(ended) == keys[name]
            if unchanged and now - max(began.st_mtime, began.st_ctime) > _SETTLED:
                found[keys[name]] = digest.hexdigest()
    finally:
        if said:
            said.on_task_end(task)
    _remember(found)
    return {name: {"bytes": path.stat().st_size, "sha256": known[keys[name]]} for name, path in files.items()}


def _key(about: os.stat_result) -> str:
    parts = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return ":".join(map(str, parts))


def _read() -> dict[str, str]:
    """What is remembered; nothing where the file is missing, damaged or not ours to read."""
    try:
        content = json.loads((cache_folder() / NAME).read_text(encoding="utf-8"))
        known = content["files"]
        if all(isinstance(key, str) and len(value) == 64 for key, value in known.items()):
            return known
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _remember(found: Mapping[str, str]) -> None:
    """Add to what is remembered. A home folder that cannot be written to costs time only."""
    if not found:
        return
    place = cache_folder() / NAME
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            known = {**_read(), **found}
            newest = dict(list(known.items())[-_MOST:])
            atomic_write(place, json.dumps({"format": 1, "files": newest}, indent=0) + "\n")
