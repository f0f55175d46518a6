"""Files that are either whole or absent, also after a power cut: written beside, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from medicalgpt_cli.errors import UsageError

TEMPORARY = ".tmp"  # suffix of what is not yet complete; readers never take it


def atomic_write(path: Path | str, content: str | bytes) -> Path:
    """Replace the file at `path`: a reader sees the old content or the new one, never a part of it."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
    return path


def fsync_path(path: Path | str) -> None:
    """Push one file or folder entry to the disk."""
    if Path(path).is_dir() and os.name != "posix":
        return  # only POSIX can sync a folder
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def fsync_tree(folder: Path | str) -> None:
    """Push every file below `folder`, and the folders themselves, to the disk."""
    for here, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(here) / name)
        fsync_path(here)


def publish(temporary: Path | str, final: Path | str) -> Path:
    """Sync a finished folder and give it its final name.

    Files are made readable as the user's umask says: some libraries save weights with mode 0600.

    Raises:
        UsageError: `final` exists; nothing is overwritten.
    """
    temporary, final = Path(temporary), Path(final)
    if final.exists():
        raise UsageError(f"{final} exists already", "name a new folder; nothing is overwritten")
    readable = 0o666 & ~_umask()
    for here, _, names in os.walk(temporary):
        for name in names:
            file = Path(here) / name
            if not file.is_symlink():
                file.chmod(file.stat().st_mode | readable)
    fsync_tree(temporary)
    temporary.rename(final)
    fsync_path(final.parent)
    return final


@contextlib.contextmanager
def staged(final: Path | str) -> Iterator[Path]:
    """A new folder beside `final` to write into; it becomes `final` if the block ends well, else it goes.

    Raises:
        UsageError: `final` exists; nothing is overwritten.
    """
    final = Path(final)
    if final.exists():
        raise UsageError(f"{final} exists already", "name a new folder; nothing is overwritten")
    temporary = final.with_name(final.name + TEMPORARY)
    remove_tree(temporary)  # what an earlier, killed attempt left
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, final)
    except BaseException:
        remove_tree(temporary)
        raise


def remove_tree(folder: Path | str) -> None:
    """Delete a folder and what is in it; a missing one is fine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    """The process's umask. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
