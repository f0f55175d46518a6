"""Files that are whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medicalgpt_cli.engine.run.files import atomic_write, publish, sha256_file, staged
from medicalgpt_cli.errors import UsageError
from tests.cli import ROOT


def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_beside(tmp_path: Path) -> None:
    file = atomic_write(tmp_path / "a.txt", "a long first content")
    atomic_write(file, "短い")
    assert file.read_bytes() == "短い".encode()
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_that_fails_keeps_the_old_content(tmp_path: Path) -> None:
    file = atomic_write(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(file, "new \ud800")  # cannot be encoded
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        atomic_write(tmp_path / "folder", "a file cannot replace a folder")
    assert file.read_text() == "old"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.txt", "folder"]


def test_no_reader_sees_half_a_file_while_a_writer_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    atomic_write(file, "0" * 300_000)
    code = (
        "import sys; from medicalgpt_cli.engine.run.files import atomic_write\n"
        "for n in range(10**6): atomic_write(sys.argv[1], str(n % 10) * 300_000)"
    )
    for wait in (0.25, 0.3, 0.35):
        writer = subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=ROOT)
        end = time.monotonic() + wait
        while time.monotonic() < end:
            content = file.read_text()
            assert len(content) == 300_000 and len(set(content)) == 1
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        content = file.read_text()
        assert len(content) == 300_000 and len(set(content)) == 1


def test_publish_renames_refuses_to_overwrite_and_makes_files_readable(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    (folder / "sub").mkdir(parents=True)
    private = folder / "sub" / "weights"
    private.write_text("x")
    private.chmod(0o600)
    before = os.umask(0o022)
    try:
        publish(folder, tmp_path / "final")
    finally:
        os.umask(before)
    assert (tmp_path / "final" / "sub" / "weights").stat().st_mode & 0o777 == 0o644
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        publish(folder, tmp_path / "final")


def test_staged_folder_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError), staged(final) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not final.exists() and list(final.parent.iterdir()) == []
    with staged(final) as folder:
        (folder / "whole").write_text("x")
        assert not final.exists()
    assert (final / "whole").read_text() == "x"
    with pytest.raises(UsageError), staged(final):
        pass


def test_staged_starts_empty_after_a_killed_attempt(tmp_path: Path) -> None:
    left = tmp_path / "model.tmp"
    left.mkdir()
    (left / "old").write_text("x")
    with staged(tmp_path / "model") as folder:
        (folder / "new").write_text("x")
    assert [one.name for one in (tmp_path / "model").iterdir()] == ["new"]


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
