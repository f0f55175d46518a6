"""Nothing in a folder is dropped without a word: refused where it cannot be read, else read, or counted and named."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.formats import rows_of
from medicalgpt_cli.engine.data.readers import expand_sources
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError
from tests.tiny import write_jsonl

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where every user of the machine may look, with two files of one record each."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "data" / "inner").mkdir(parents=True)
        write_jsonl(place / "data" / "a.jsonl", [{"text": "one"}])
        write_jsonl(place / "data" / "inner" / "b.jsonl", [{"text": "two"}])
        yield place


def read(data: Path) -> tuple[list[str], list[str]]:
    counts = Counts()
    texts = [row.value["text"] for row in rows_of([str(data)], counts, Observer())]
    return texts, counts.notices


def test_a_linked_folder_is_read_and_said(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    write_jsonl(folder / "elsewhere" / "c.jsonl", [{"text": "three"}])
    (folder / "data" / "more").symlink_to(folder / "elsewhere")
    texts, notices = read(folder / "data")
    assert texts == ["one", "two", "three"]
    assert notices == [f"1 linked folders are read, too, such as {folder}/data/more"]


def test_links_in_a_circle_end(folder: Path) -> None:
    (folder / "data" / "inner" / "up").symlink_to(folder / "data")
    (folder / "outside").mkdir()
    (folder / "outside" / "back").symlink_to(folder / "data" / "inner")
    (folder / "outside" / "self").symlink_to(folder / "outside")
    (folder / "data" / "out").symlink_to(folder / "outside")
    texts, notices = read(folder / "data")
    assert texts == ["one", "two"]
    assert any("3 links lead to what is read already" in one for one in notices)


def test_a_file_that_is_linked_beside_itself_is_read_once(folder: Path) -> None:
    (folder / "data" / "0-latest.jsonl").symlink_to("a.jsonl")
    texts, notices = read(folder / "data")
    assert texts == ["one", "two"]
    assert notices == [
        f"1 links lead to what is read already and are left out, such as {folder}/data/0-latest.jsonl"
    ]


@pytest.mark.parametrize("target", ["gone.jsonl", "gone", "broken", "a.jsonl/x"])
def test_a_link_that_leads_nowhere_is_refused(folder: Path, target: str) -> None:
    (folder / "data" / "broken").symlink_to(target)
    with pytest.raises(DataError, match=r"data/broken: the link leads nowhere"):
        expand_sources([str(folder / "data")])


def test_hidden_files_and_pipes_are_counted(folder: Path) -> None:
    write_jsonl(folder / "data" / ".part.jsonl", [{"text": "hidden"}])
    (folder / "data" / ".DS_Store").write_bytes(b"")
    (folder / "data" / ".git").mkdir()
    os.mkfifo(folder / "data" / "pipe.jsonl")
    texts, notices = read(folder / "data")
    assert texts == ["one", "two"]
    assert notices == [
        f"2 hidden files and folders are left out, such as {folder}/data/.git",
        f"1 entries that are neither file nor folder are left out, such as {folder}/data/pipe.jsonl",
    ]


def test_an_empty_file_is_refused(folder: Path) -> None:
    (folder / "data" / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.jsonl: the file holds no record"):
        read(folder / "data")


def _as_nobody(work: Callable[[], object], answers) -> None:
    if os.getuid() == 0:  # who may read everything
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        answers.put(("nothing was refused", work()))
    except DataError as problem:
        answers.put((problem.message, problem.hint))


@pytest.mark.parametrize(
    ("closed", "word"),
    [
        ("data/inner", "data/inner: cannot be read (Permission denied)"),
        ("data", "data: cannot be read (Permission denied)"),
        ("data/inner/b.jsonl", "data/inner/b.jsonl: Permission denied"),
        ("elsewhere", "data/link: cannot be read (Permission denied)"),
    ],
)
def test_what_may_not_be_read_is_refused(folder: Path, closed: str, word: str) -> None:
    (folder / "elsewhere" / "deep").mkdir(parents=True)
    (folder / "data" / "link").symlink_to(folder / "elsewhere" / "deep")
    place = folder / closed
    place.chmod(0)
    try:
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=_as_nobody, args=(lambda: read(folder / "data"), answers))
        child.start()
        child.join()
        assert answers.get()[0] == f"{folder}/{word}"
    finally:
        place.chmod(0o755)
