"""Files that are either whole or absent, also after a power cut: written beside, synced, renamed.

And the one place that says who may read them: the user alone, whatever the umask, but for models that are made to be
given away (merged, pulled), which the umask decides about.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from medicalgpt_cli.errors import UsageError

TEMPORARY = ".tmp"  # suffix of what is not yet complete; readers never take it
PRIVATE, GROUP = 0o700, 0o750  # modes of folders; their files have the same without the right to execute
PASSABLE = 0o710  # who knows the name of something inside gets to it


def atomic_write(path: Path | str, content: str | bytes) -> Path:
    """Replace the file at `path`: a reader sees the old content or the new one, never a part of it.

    The user alone may read it.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open_private(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
    return path


def open_private(path: Path | str, mode: str) -> IO[Any]:
    """Open a file to write or append; the user alone may read it, also if it was there already."""
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    with contextlib.suppress(OSError):  # somebody else's
        os.fchmod(file.fileno(), 0o600)
    return file


def private_folder(path: Path) -> None:
    """Make a folder, or take one that is there: the user alone may enter it. Parents are made as the umask says."""
    path.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
    with contextlib.suppress(OSError):  # somebody else's
        path.chmod(PRIVATE)


def set_modes(folder: Path, mode: int, *, leave_out: Collection[Path] = ()) -> None:
    """Give a folder and all that is in it one mode, the files without the right to execute. Links are not followed."""
    for here, folders, names in os.walk(folder):
        place = Path(here)
        folders[:] = [one for one in folders if place / one not in leave_out]
        with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
            place.chmod(mode)
        for file in (place / name for name in names):
            with contextlib.suppress(OSError):
                if not file.is_symlink():
                    file.chmod(mode & 0o666)


def open_to_others(path: Path) -> bool:
    """Whether anybody but the user may list or change a folder, or read or change a file."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o066)


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


def publish(temporary: Path | str, final: Path | str, mode: int | None = None) -> Path:
    """Sync a finished folder and give it its final name.

    Args:
        mode: of the folders in it; None: what the umask says, also for weights that a library has saved with 0600.

    Raises:
        UsageError: `final` exists; nothing is overwritten.
    """
    temporary, final = Path(temporary), Path(final)
    if final.exists():
        raise UsageError(f"{final} exists already", "name a new folder; nothing is overwritten")
    set_modes(temporary, 0o777 & ~_umask() if mode is None else mode)
    fsync_tree(temporary)
    temporary.rename(final)
    fsync_path(final.parent)
    return final


@contextlib.contextmanager
def staged(final: Path | str, mode: int | None = None) -> Iterator[Path]:
    """A new folder beside `final` to write into; it becomes `final` if the block ends well, else it goes.

    Args:
        mode: as for `publish`.

    Raises:
        UsageError: `final` exists; nothing is overwritten.
    """
    final = Path(final)
    if final.exists():
        raise UsageError(f"{final} exists already", "name a new folder; nothing is overwritten")
    temporary = final.with_name(final.name + TEMPORARY)
    remove_tree(temporary)  # what an earlier, killed attempt left
    temporary.mkdir(parents=True, mode=0o777 if mode is None else mode)
    try:
        yield temporary
        publish(temporary, final, mode)
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
