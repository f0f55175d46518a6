"""Files that would take any time or memory: each ends at a bound that the message names, and large ones pass."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from medicalgpt_cli.engine.data import limits
from medicalgpt_cli.engine.data.readers import read_rows
from medicalgpt_cli.engine.generation.questions import read_questions
from medicalgpt_cli.errors import DataError, MedgptError, UnsafeRefused
from tests.cli import medgpt


def refused(path: Path, kind: type[MedgptError], *words: str, unit: str = "line") -> None:
    with pytest.raises(kind) as caught:
        for _ in read_rows(path, text_unit=unit):
            pass
    assert path.name in caught.value.message and caught.value.hint
    for word in words:
        assert word in caught.value.message


@pytest.fixture
def narrow(monkeypatch):
    """Bounds that a small file reaches."""
    monkeypatch.setattr(limits, "UNPACKED", 1 << 20)
    monkeypatch.setattr(limits, "LONGEST_RECORD", 1 << 17)
    monkeypatch.setattr(limits, "LARGEST_WHOLE", 1 << 18)


@pytest.mark.parametrize("name", ["bomb.csv.gz", "bomb.jsonl.gz", "bomb.txt.gz", "bomb.json.gz"])
def test_a_gzip_file_that_unpacks_to_a_thousand_times_its_size(name, narrow, tmp_path):
    piece = {".csv": b"a,b\n", ".json": b'["a"],\n', ".txt": b"the same\n"}.get(
        Path(name).suffixes[0], b'{"text": "a"}\n'
    )
    path = tmp_path / name
    start = b"[" if name == "bomb.json.gz" else b""
    path.write_bytes(gzip.compress(start + piece * (2**21 // len(piece))))
    refused(path, UnsafeRefused, "200 times")


def test_a_zstandard_file_that_unpacks_to_a_thousand_times_its_size(narrow, tmp_path):
    import zstandard

    path = tmp_path / "bomb.txt.zst"
    path.write_bytes(zstandard.compress(b"the same\n" * 2**20))
    refused(path, UnsafeRefused, "200 times")


def test_all_frames_of_a_zstandard_file_are_read(tmp_path):
    import zstandard

    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(b'{"text": "a"}\n') for _ in range(3)))
    assert len(list(read_rows(path))) == 3


def test_packed_text_passes(narrow, tmp_path):
    """More than what is free, and packed as well as text can be."""
    rows = [{"question": f"What is {number}?", "answer": f"{number} " * 9} for number in range(20_000)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in rows).encode()))
    assert [one.value for one in read_rows(path)] == rows


def test_a_table_without_line_ends_and_one_without_a_closing_quote(narrow, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\n" + "a" * 2**18)
    refused(path, DataError, ":2:", "line of more than")
    path.write_text('question,answer\n"' + "a,b\n" * 2**16)
    refused(path, DataError, "record of more than")


def test_documents_and_objects_in_one_piece(narrow, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a line\n" * 2**16)
    refused(path, DataError, "document of more than", unit="block")
    refused(path, DataError, "in one piece", unit="file")
    path = tmp_path / "a.json"
    path.write_text('{\n"data": [\n' + '"a",\n' * 2**17)
    refused(path, DataError, "in one piece")


def test_a_record_of_millions_of_lists(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": [' + "[]," * 2_100_000 + "1]}\n")
    refused(path, DataError, ":1:", "2,000,000 lists")


def test_a_line_of_ten_megabytes_passes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "[{ " * (10 * 2**20 // 3)}) + "\n")
    with pytest.raises(DataError, match="lists and objects"):  # brackets are not told from text
        list(read_rows(path))
    path.write_text(json.dumps({"text": "a [b] {c} d " * (10 * 2**20 // 12)}) + "\n")
    assert len(next(iter(read_rows(path))).value["text"]) > 10**7


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_pipes_and_devices_are_no_files(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.txt", "a.parquet", "a.json.gz", "a"):
        path = tmp_path / name
        os.mkfifo(path)
        if Path(name).suffix:
            refused(path, UnsafeRefused, "a pipe")
        with pytest.raises(UnsafeRefused, match="a pipe"):
            read_questions(str(path))
        path.unlink()
        path.symlink_to("/dev/zero")
        with pytest.raises(UnsafeRefused, match="a device"):
            read_questions(str(path))
    done = medgpt("sft", "--train-data", tmp_path / "a.csv", "--dry-run")
    assert done.returncode == 4 and "a device" in done.stderr and "hint:" in done.stderr


# -- Parquet ------------------------------------------------------------------------------------------------


def parquet(path: Path, table, **options) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path, **options)
    return path


def test_a_small_parquet_file_of_gigabytes(tmp_path):
    import pyarrow

    one = pyarrow.array(["a" * 4_000_000])
    many = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 700, pyarrow.int32()), one)
    path = parquet(tmp_path / "bomb.parquet", pyarrow.table({"text": many}), compression="zstd")
    assert path.stat().st_size < 100_000
    refused(path, UnsafeRefused, "MiB of memory")


def test_a_parquet_record_of_millions_of_values(tmp_path):
    import pyarrow

    for values in (
        pyarrow.nulls(20_000_000),
        pyarrow.array([7]).take(pyarrow.nulls(20_000_000, pyarrow.int8())),
    ):
        lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values)
        path = parquet(tmp_path / "long.parquet", pyarrow.table({"text": lists}), compression="zstd")
        assert path.stat().st_size < 100_000
        refused(path, DataError, "record of more than 64 MiB")


def test_parquet_of_every_kind_is_read_as_before(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {
            "text": [f"文 {n}" for n in range(3000)],
            "kind": pyarrow.array(["a", "b", None] * 1000).dictionary_encode(),
            "turns": [[{"role": "user", "content": str(n)}] for n in range(3000)],
            "day": [datetime.date(2026, 1, 1)] * 3000,
            "none": [None] * 3000,
            "map": pyarrow.array([[("k", 1)]] * 3000, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        }
    )
    path = parquet(tmp_path / "a.parquet", table, row_group_size=700)
    assert [one.value for one in read_rows(path)] == pyarrow.parquet.read_table(path).to_pylist()
    assert [one.line for one in read_rows(path)] == list(range(1, 3001))
    assert next(iter(read_rows(path))).line == 1  # left early


def test_damaged_parquet_files(tmp_path):
    import pyarrow

    whole = parquet(tmp_path / "a.parquet", pyarrow.table({"text": ["a" * 500] * 300})).read_bytes()
    path = tmp_path / "b.parquet"
    for broken in (b"", b"PAR1", whole[:-40], whole[:50] + b"\0" * 20 + whole[70:], b"a" * len(whole)):
        path.write_bytes(broken)
        refused(path, DataError, "not a Parquet file")
