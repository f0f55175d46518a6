"""The files of a folder that was named as data: all of them, or a word about each kind that is left out."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from medicalgpt_cli.errors import DataError

_LEADS_NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)


class FolderFiles:
    """The regular files below a folder, sorted, links followed.

    A folder or file that a link leads to is read once: what has been met before is left out, so that a link to a
    folder above itself ends. What a program has hidden (a name that begins with a dot) is no data.

    Raises:
        DataError: a folder cannot be read, or a link leads nowhere. Going on would drop data without a word.
    """

    def __init__(self, folder: Path):
        self.files: list[Path] = []
        self.hidden: list[Path] = []
        self.linked_folders: list[Path] = []  # that were read
        self.repeated: list[Path] = []  # links to what is read already
        self.odd: list[Path] = []  # pipes, sockets, devices
        self._seen: set[tuple[int, int]] = set()
        links: list[Path] = []
        self._walk(folder, links)
        while links:  # behind all that lies there itself, which so keeps its own name
            here, links = sorted(links), []
            for link in here:
                self._follow(link, links)
        self.files.sort()

    def notices(self, is_data: Callable[[Path], object]) -> list[str]:
        """A line for each kind that is left out, and one for linked folders.

        Args:
            is_data: whether a file would be read; hidden ones that would not are nobody's loss.
        """
        hidden = [path for path in self.hidden if path.is_dir() or is_data(path)]
        kinds = (
            (hidden, "hidden files and folders are left out"),
            (self.repeated, "links lead to what is read already and are left out"),
            (self.odd, "entries that are neither file nor folder are left out"),
            (self.linked_folders, "linked folders are read, too"),
        )
        return [f"{len(paths)} {word}, such as {min(paths)}" for paths, word in kinds if paths]

    def _walk(self, folder: Path, links: list[Path]) -> None:
        try:
            self._met(folder.stat())
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith("."):
                    self.hidden.append(path)
                elif entry.is_symlink():
                    links.append(path)
                else:
                    self._take(path, path.stat(), links)
        except OSError as problem:
            raise _unreadable(problem, folder) from None

    def _take(self, path: Path, about: os.stat_result, links: list[Path]) -> None:
        if stat.S_ISDIR(about.st_mode):
            self._walk(path, links)
        elif stat.S_ISREG(about.st_mode):
            self._met(about)
            self.files.append(path)
        else:
            self.odd.append(path)

    def _follow(self, link: Path, links: list[Path]) -> None:
        try:
            about = link.stat()
        except OSError as problem:
            if problem.errno in _LEADS_NOWHERE:
                raise DataError(
                    "the link leads nowhere", "put back what it leads to, or remove it", at=str(link)
                ) from None
            raise _unreadable(problem, link) from None
        if (about.st_dev, about.st_ino) in self._seen:
            self.repeated.append(link)
            return
        if stat.S_ISDIR(about.st_mode):
            self.linked_folders.append(link)
        self._take(link, about, links)

    def _met(self, about: os.stat_result) -> None:
        self._seen.add((about.st_dev, about.st_ino))


def _unreadable(problem: OSError, place: Path) -> DataError:
    return DataError(
        f"cannot be read ({problem.strerror or type(problem).__name__})",
        "its data would be missing: give yourself access, or move it out of the folder",
        at=str(problem.filename or place),
    )
