"""Every file of tests/data/bad, held against EXPECTED.json: what it does, where, and what is still used."""

from __future__ import annotations

import functools
import json

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import render_conversation
from medicalgpt_cli.engine.data.formats import load_conversations
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.readers import read_rows
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError
from tests.conftest import DATA
from tests.tiny import tiny_tokenizer

BAD = DATA / "bad"
CASES = json.loads((BAD / "EXPECTED.json").read_text(encoding="utf-8"))
MAX_LENGTH = 2048
# Words of the records: none of them may turn up in a message.
PATIENT_TEXT = ("感冒", "高血压", "糖尿病", "饮水", "咳嗽", "胃痛", "13800001234", "肝炎")


def cases(*stages: str) -> list:
    return [pytest.param(case, id=case["file"]) for case in CASES if case["stage"] in stages]


def test_no_case_is_forgotten():
    files = {path.name for path in BAD.iterdir()} - {"EXPECTED.json", "real_gbk_dialogues.csv"}
    assert {case["file"] for case in CASES} == files
    # reward: test_preferences.py; eval and phi have no stage of their own yet: only their reading is tested
    assert {case["stage"] for case in CASES} == {"sft", "reward", "eval", "phi", "pretrain"}


@functools.cache
def tokenizer():
    return tiny_tokenizer("chatml")


def outcome(file: str) -> tuple[list[Conversation], Counts, DataError | None]:
    """What is left of a file behind rendering, as `medgpt sft` does it."""
    counts = Counts()
    try:
        found = load_conversations([str(BAD / file)], counts, Observer())
    except DataError as problem:
        return [], counts, problem
    rendered = [one for one in found if render_conversation(tokenizer(), one, MAX_LENGTH, counts)]
    return rendered, counts, None


def check_message(problem: DataError, file: str, line: int | None) -> None:
    text = f"{problem.message} {problem.hint}"
    assert file in problem.message
    assert "\n" not in text
    assert not [word for word in PATIENT_TEXT if word in text]
    assert problem.hint
    if line is not None:
        assert f"{file}:{line}:" in problem.message


@pytest.mark.parametrize("case", cases("sft"))
def test_sft_case(case):
    used, counts, problem = outcome(case["file"])
    allowed = case["expect"].removesuffix("_clearly")
    line, good = case.get("line"), case.get("good_records")

    if problem is not None:
        assert "reject" in allowed, f"{case['file']}: {problem.message}"
        first_place = min((int(place.rsplit(":", 1)[1]) for place in _skipped_places(counts)), default=None)
        check_message(problem, case["file"], line if first_place is None else None)
        if first_place is not None:
            assert first_place == line  # the named line was skipped, and a later one ended the run
        return
    assert allowed != "reject", f"{case['file']} was accepted"
    assert counts.used == len(used)
    if "skip" in allowed and "truncate" not in allowed and "merge" not in allowed and "accept" not in allowed:
        assert sum(counts.skipped.values()) > 0
        assert f"{BAD / case['file']}:{line}" in _skipped_places(counts)
        if good is not None:
            assert len(used) == good
    elif "merge" in allowed or "truncate" in allowed:
        assert counts.merged or counts.truncated or counts.skipped
        assert f"{BAD / case['file']}:{line}" in [
            place for places in counts.places.values() for place in places
        ]
        assert len(used) >= good
    else:
        if good is not None:
            assert len(used) >= good
            assert not counts.skipped
        if "warning" in allowed:
            assert counts.notices


def _skipped_places(counts: Counts) -> list[str]:
    return [place for reason in counts.skipped for place in counts.places[reason]]


@pytest.mark.parametrize(
    "file",
    ["truncated_line.jsonl", "trailing_comma.jsonl", "python_dict.jsonl", "fullwidth_quotes.jsonl",
     "unknown_role.jsonl", "mixed_utf8_gbk.jsonl", "invalid_byte.jsonl", "nul_bytes.jsonl",
     "deep_nesting.jsonl"],
)  # fmt: skip
def test_rows_in_front_of_the_bad_one_are_read(file):
    case = next(case for case in CASES if case["file"] == file)
    read = []
    with pytest.raises(DataError):
        for row in read_rows(BAD / file):
            read.append(row)
            if file == "unknown_role.jsonl" and row.line == case["line"]:
                raise DataError("reading itself has no opinion about roles")
    assert [row.line for row in read][: case["line"] - 1] == list(range(1, case["line"]))


@pytest.mark.parametrize("case", cases("pretrain"))
def test_pretrain_case_as_far_as_reading(case):
    path = BAD / case["file"]
    if case["expect"] == "reject":
        if case["file"] == "blank.txt":
            assert list(read_rows(path)) == []
            return
        with pytest.raises(DataError) as problem:
            list(read_rows(path))
        check_message(problem.value, case["file"], case["line"])
    elif case["expect"] == "accept_with_warning":
        notices: list[str] = []
        assert len(list(read_rows(path, notices=notices))) == case["good_records"]
        assert case["file"] in notices[0] and "GB18030" in notices[0]
    elif case["file"] == "no_spaces.txt":
        (row,) = read_rows(path)
        assert len(row.value) == path.stat().st_size - 1
        assert len(tokenizer()(row.value)["input_ids"]) > 0


@pytest.mark.parametrize("case", cases("reward", "eval", "phi", "pretrain"))
def test_files_of_other_stages_are_no_instruction_data_or_say_what_is_wrong(case):
    """`medgpt sft` on a file made for another stage: a clear word, or records that are counted."""
    used, counts, problem = outcome(case["file"])
    if problem is not None:
        check_message(problem, case["file"], None)
    else:
        assert case["stage"] == "reward" or case["file"] == "mcq_forms.jsonl"
        assert len(used) + sum(counts.skipped.values()) == counts.read


def test_real_gbk_table_is_read_and_named():
    used, counts, problem = outcome("real_gbk_dialogues.csv")
    assert problem is None
    assert len(used) > 20
    assert any("GB18030" in notice and "real_gbk_dialogues.csv" in notice for notice in counts.notices)
    assert used[0].messages[0]["content"].startswith("我有高血压")
    assert used[0].messages[1]["content"].startswith("高血压病人可以口服党参的")
