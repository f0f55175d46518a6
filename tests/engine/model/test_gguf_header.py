"""GGUF files that claim more than they hold are refused before a library counts on it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from medicalgpt_cli.engine.model.gguf_header import check_header
from medicalgpt_cli.errors import UnsafeRefused, UsageError
from tests.cli import medgpt
from tests.engine.model.tiny_gguf import tiny_gguf

KEY = struct.pack("<Q", 1) + b"k"


def gguf(tensors: int, settings: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, settings) + rest


BOMBS = {
    "tensors": (gguf(2**40, 0, bytes(64)), "1,099,511,627,776 tensors"),
    "settings": (gguf(0, 2**40, bytes(64)), "1,099,511,627,776 settings"),
    "text": (gguf(0, 1, struct.pack("<Q", 2**60) + bytes(16)), "bytes of text"),
    "numbers": (gguf(0, 1, KEY + struct.pack("<IIQ", 9, 0, 2**40)), "1,099,511,627,776 numbers"),
    "texts": (gguf(0, 1, KEY + struct.pack("<IIQ", 9, 8, 2**40)), "1,099,511,627,776 texts"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_claims_more_than_the_file_holds_is_refused(name: str, tmp_path: Path) -> None:
    content, claim = BOMBS[name]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UnsafeRefused, match=claim):
        check_header(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "content",
    [b"", b"GGML" + bytes(40), gguf(0, 0)[:10], gguf(0, 1, KEY + struct.pack("<I", 99)),
     gguf(1, 0, KEY + struct.pack("<I", 2**31) + bytes(64))],
)  # fmt: skip
def test_what_is_no_gguf_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UsageError, match="no GGUF file"):
        check_header(tmp_path / "m.gguf")


def test_a_real_file_passes(tmp_path: Path) -> None:
    check_header(tiny_gguf(tmp_path)[0])


def test_a_command_refuses_such_a_file_with_exit_code_4(tmp_path: Path) -> None:
    """Without the check the library makes 2^40 entries: the limit of memory ends it."""
    (tmp_path / "m.gguf").write_bytes(BOMBS["numbers"][0])
    (tmp_path / "q.txt").write_text("What helps?\n")
    done = medgpt(
        *("infer", "--base-model", "m.gguf", "--data-file", "q.txt", "--predictions-file", "a.jsonl"),
        cwd=tmp_path,
    )
    assert done.returncode == 4, done.stderr
    assert "1,099,511,627,776 numbers" in done.stderr
