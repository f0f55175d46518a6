"""Hashes of files: right, remembered while a file is the same, and worked out anew as soon as it is not."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from medicalgpt_cli.engine import starter
from medicalgpt_cli.engine.run import fingerprints
from medicalgpt_cli.engine.run.fingerprints import fingerprint_files

OLD = starter.MODEL / "model.safetensors"  # written long before this test


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("MEDGPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def remembered(home: Path) -> dict[str, str]:
    return json.loads((home / fingerprints.NAME).read_text())["files"]


def test_a_file_is_hashed_once(home: Path) -> None:
    right = hashlib.sha256(OLD.read_bytes()).hexdigest()
    assert fingerprint_files({"a": OLD}) == {"a": {"bytes": OLD.stat().st_size, "sha256": right}}
    [(key, value)] = remembered(home).items()
    assert value == right
    # What is remembered is what is given: the file is not read again.
    (home / fingerprints.NAME).write_text(json.dumps({"format": 1, "files": {key: "0" * 64}}))
    assert fingerprint_files({"a": OLD})["a"]["sha256"] == "0" * 64


def test_what_was_written_just_now_is_not_remembered(home: Path, tmp_path: Path) -> None:
    """It could change again without another time: a file system's clock ticks."""
    file = tmp_path / "new"
    file.write_bytes(b"one")
    one = fingerprint_files({"a": file})["a"]["sha256"]
    times = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint_files({"a": file})["a"]["sha256"] == hashlib.sha256(b"two").hexdigest() != one
    assert not (home / fingerprints.NAME).exists()


def test_a_link_is_known_by_what_it_leads_to(home: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(OLD)
    assert fingerprint_files({"a": tmp_path / "link"}) == fingerprint_files({"a": OLD})
    assert len(remembered(home)) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', '{"files": {"a": 3}}', "\xff"])
def test_a_damaged_memory_is_made_anew(home: Path, content: str) -> None:
    home.mkdir()
    (home / fingerprints.NAME).write_text(content, encoding="latin-1")
    fingerprint_files({"a": OLD})
    assert len(remembered(home)) == 1


def test_a_home_that_cannot_be_written_to_costs_time_only(home: Path) -> None:
    home.write_text("a file")
    assert len(fingerprint_files({"a": OLD})["a"]["sha256"]) == 64


def _remember(number: int) -> None:
    fingerprints._remember({f"{number}:{one}": "0" * 64 for one in range(20)})


def test_processes_that_write_at_once_lose_nothing(home: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        pool.map(_remember, range(8))
    assert len(remembered(home)) == 160
