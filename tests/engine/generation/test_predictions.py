"""The file of answers: killed at any point, it goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medicalgpt_cli.engine.generation.predictions import PredictionFile
from medicalgpt_cli.errors import UsageError

RUN = {"the questions": "abc", "--max-new-tokens": "8"}


def begin(path: Path, *, resume: bool = False, overwrite: bool = False, identity=RUN) -> PredictionFile:
    return PredictionFile(path, identity, resume=resume, overwrite=overwrite)


def row(number: int) -> dict:
    return {"id": str(number), "output": f"回答 {number}\u2028\r"}


def partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_cut_at_every_byte_no_row_is_lost_or_doubled(tmp_path: Path, name: str):
    """A run that was torn at any byte behind its header ends with the same file as one that was not."""
    path = tmp_path / name
    file = begin(path)
    for number in (2, 0, 1):  # answers come in any order
        file.add(number, row(number))
    file.sync()
    torn = partial(path).read_bytes()
    whole = file.finish().read_bytes()
    text = whole.decode()
    rows = (
        json.loads(text) if name.endswith(".json") else [json.loads(one) for one in text.split("\n") if one]
    )
    assert rows == [row(0), row(1), row(2)]
    header = torn.index(b"\n") + 1
    for length in range(header, len(torn) + 1):
        path.unlink(missing_ok=True)
        partial(path).write_bytes(torn[:length])
        file = begin(path, resume=True)
        assert set(file.rows) == set([2, 0, 1][: torn[header:length].count(b"\n")])
        for number in {0, 1, 2} - set(file.rows):
            file.add(number, row(number))
        file.finish()
        assert path.read_bytes() == whole
        assert sorted(one.name for one in tmp_path.iterdir()) == [name]


def interrupted(path: Path, **options) -> None:
    file = begin(path, **options)
    file.add(0, row(0))
    file.close()


def test_killed_between_the_last_two_steps(tmp_path: Path):
    path = tmp_path / "out.json"
    interrupted(path)
    left = partial(path).read_bytes()
    begin(path, resume=True).finish()
    partial(path).write_bytes(left)  # the finished file is there, the partial one not yet gone
    file = begin(path, resume=True)
    assert set(file.rows) == {0}
    file.finish()
    assert not partial(path).exists()


def test_a_file_that_came_meanwhile_is_not_overwritten(tmp_path: Path):
    path = tmp_path / "out.json"
    interrupted(path)
    path.write_text("precious")
    with pytest.raises(UsageError, match="something else"):
        begin(path, resume=True)
    assert path.read_text() == "precious" and partial(path).exists()


def test_a_run_that_overwrites_can_be_resumed(tmp_path: Path):
    path = tmp_path / "out.json"
    path.write_text("old")
    interrupted(path, overwrite=True)
    assert path.read_text() == "old"  # until the new one is complete
    begin(path, resume=True).finish()
    assert json.loads(path.read_text()) == [row(0)]


def test_what_changed_is_named(tmp_path: Path):
    path = tmp_path / "out.json"
    interrupted(path)
    with pytest.raises(UsageError, match="--max-new-tokens changed"):
        begin(path, resume=True, identity={**RUN, "--max-new-tokens": "9"})
    with pytest.raises(UsageError, match="interrupted run"):
        begin(path)
    partial(path).write_text("something of the user's\n")
    with pytest.raises(UsageError, match="not an interrupted run"):
        begin(path, resume=True)
    assert partial(path).read_text() == "something of the user's\n"


def test_two_processes_do_not_write_one_file(tmp_path: Path):
    path = tmp_path / "out.json"
    first = begin(path)
    with pytest.raises(UsageError, match="another process"):
        begin(path, resume=True)
    first.add(0, row(0))
    first.finish()
    assert [one.name for one in tmp_path.iterdir()] == ["out.json"]


def test_a_run_without_an_answer_leaves_nothing(tmp_path: Path):
    begin(tmp_path / "out.json").close()
    assert not list(tmp_path.iterdir())


def test_the_ending_decides_the_format(tmp_path: Path):
    with pytest.raises(UsageError, match="ending"):
        begin(tmp_path / "out.csv")
