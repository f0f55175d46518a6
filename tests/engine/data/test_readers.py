"""Containers and encodings: the same records come out of each, and damage has a place and a word."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.formats import load_conversations
from medicalgpt_cli.engine.data.readers import HubDataset, expand_sources, read_rows
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError
from tests.conftest import DATA

ROWS = [
    {"question": f"Was ist {i}? 感冒\u2028\u0085", "answer": 'a "quoted", text\nof two lines'}
    for i in range(5)
]


def values(path) -> list:
    return [row.value for row in read_rows(path)]


def write(path, how):
    import csv
    import io

    import pyarrow
    import pyarrow.parquet
    import zstandard

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    table = io.StringIO()
    writer = csv.DictWriter(table, ["question", "answer"])
    writer.writeheader()
    writer.writerows(ROWS)
    if how == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return
    content = {
        "lines": lines,
        "bom": b"\xef\xbb\xbf" + lines,
        "crlf": lines.replace(b"\n", b"\r\n"),
        "array": json.dumps(ROWS, indent=1).encode(),
        "compact": json.dumps(ROWS, ensure_ascii=False).encode(),
        "data": json.dumps({"data": ROWS}, indent=1).encode(),
        "gzip": gzip.compress(lines),
        "zstd": zstandard.compress(lines),
        "csv": table.getvalue().encode(),
        "csv.gz": gzip.compress(table.getvalue().encode("utf-8-sig")),
    }[how]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "name"),
    [("lines", "a.jsonl"), ("lines", "a.json"), ("lines", "A.JSONL"), ("bom", "a.jsonl"), ("crlf", "a.jsonl"),
     ("array", "a.json"), ("array", "a.jsonl"), ("compact", "a.json"), ("compact", "a.jsonl"),
     ("data", "a.json"),
     ("gzip", "a.jsonl.gz"), ("zstd", "a.jsonl.zst"), ("csv", "a.csv"), ("csv.gz", "a.csv.gz"),
     ("parquet", "a.parquet")],
)  # fmt: skip
def test_every_container_gives_the_same_records(tmp_path, how, name):
    write(tmp_path / name, how)
    assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-30], "cut short"),
        ("a.jsonl.gz", b"no gzip", "not a gzip file"),
        ("a.jsonl.zst", b"no zstd", "not a Zstandard file"),
        ("a.parquet", b"PAR1 no parquet", "not a Parquet file"),
        ("a.json", b'[{"text": "x"}, {"text": "y"}', "not valid JSON"),
        ("a.json", b'[{"text": "x"}] trailing', "not valid JSON"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "too many digits"),
        ("a.csv", b"question,answer\na,b\nc\n", "columns"),
        ("a.csv", b'question,answer\na,"b\n', "not a valid table"),
        ("a.csv", "question,answer\ncafé,naïve\n".encode() + b"\xff\xfe\n", ":3: not UTF-8"),
    ],
)
def test_damage_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as problem:
        values(tmp_path / name)
    assert words in problem.value.message and name in problem.value.message
    assert problem.value.hint


def test_a_table_in_gb18030(tmp_path):
    (tmp_path / "a.csv").write_bytes("question,answer\n感冒怎么办,多喝水\n".encode("gb18030"))
    notices: list[str] = []
    (row,) = read_rows(tmp_path / "a.csv", notices=notices)
    assert row.value == {"question": "感冒怎么办", "answer": "多喝水"}
    assert len(notices) == 1 and "GB18030" in notices[0]


def test_text_units(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n", encoding="utf-8")
    assert [(row.line, row.value) for row in read_rows(path)] == [(1, "one"), (2, "two"), (5, "three")]
    assert [(row.line, row.value) for row in read_rows(path, text_unit="block")] == [
        (1, "one\ntwo"),
        (5, "three"),
    ]


def test_folders_are_sorted_and_what_is_ignored_is_told(tmp_path):
    for name in ("b.jsonl", "a.csv", "inner/c.json.gz", "notes.docx", ".hidden/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found, ignored = expand_sources([str(tmp_path)])
    assert [path.name for path in found] == ["a.csv", "b.jsonl", "c.json.gz"]
    assert [path.rsplit("/", 1)[-1] for path in ignored] == ["notes.docx"]


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}")
    assert expand_sources(["owner/name", "owner/name:test"])[0] == [
        HubDataset("owner/name", "train"),
        HubDataset("owner/name", "test"),
    ]
    with pytest.raises(DataError) as problem:
        expand_sources(["trian.jsonl"])
    assert "train.jsonl" in problem.value.hint
    with pytest.raises(DataError) as problem:
        values(HubDataset("owner/no-such-data-set", "train"))  # the tests are offline
    assert "owner/no-such-data-set" in problem.value.message


def test_memory_stays_bounded(tmp_path):
    """20 MB of records pass through a few MiB."""
    record = json.dumps({"question": "q" * 500, "answer": "a" * 500})
    for name, start, between, end in (("a.jsonl", "", "\n", ""), ("a.json", "[", ",\n", "]")):
        path = tmp_path / name
        path.write_text(start + between.join([record] * 20_000) + end)
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 2**20, f"{name}: {peak / 2**20:.0f} MiB"


def test_line_numbers_of_blank_lines_and_max_samples():
    assert [row.line for row in read_rows(DATA / "bad" / "blank_lines.jsonl")] != [1, 2]
    counts = Counts()
    found = load_conversations([str(DATA / "medquad_en_alpaca.jsonl")], counts, Observer(), max_samples=7)
    assert len(found) == counts.used == counts.read == 7
