"""`medgpt data` as a program."""

from __future__ import annotations

import json
import os
import stat

import pytest

from medicalgpt_cli.commands import data
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import InspectDataSettings
from tests.cli import medgpt
from tests.conftest import DATA
from tests.tiny import tiny_model, write_jsonl


def rows(number: int = 40, **more) -> list[dict]:
    return [
        {"question": f"What is finding {n} of {n * 7919}?", "answer": f"It is {n}.", **more}
        for n in range(number)
    ]


def run(*files, **options) -> dict:
    """The command in this process; what it shows goes to stdout."""
    return data.run(InspectDataSettings(files=tuple(map(str, files)), **options), Observer())


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def test_with_a_model(tmp_path):
    model = tiny_model(tmp_path / "model")
    done = medgpt("data", DATA / "mts_dialog_en_messages.jsonl", "--base-model", model, "--max-length", 8192)
    assert done.returncode == 0, done.stderr
    assert "40 used of 40 read" in done.stdout and "messages" in done.stdout
    assert "length in tokens" in done.stdout and "⟦" in done.stdout


def test_json_holds_counts_and_no_record(tmp_path):
    row = {"question": "fever-word", "answer": "rest-word", "ward": "ward-word"}
    pair = {"prompt": "fever-word", "chosen": "good-word", "rejected": "bad-word", "id": "id-word"}
    for one, use in ((row, "conversations"), (pair, "pairs")):
        path = write_jsonl(tmp_path / f"{use}.jsonl", [one, {**one, "answer": 7, "rejected": 7}, one])
        done = medgpt("data", path, "--json", "--group", "id" if use == "pairs" else "ward")
        assert done.returncode == 2
        found = json.loads(done.stdout)
        assert found["use"] == use and found["read"] == 3 and found["wrong_total"] == 1
        assert found["duplicates"]["exact"] == 1 and found["unit"] == "characters"
        assert {one["key"] for one in found["keys"]} == one.keys()
        assert "-word" not in done.stdout + done.stderr
        assert done.stderr.splitlines()[-2].startswith("error: 1 record is wrong")


@pytest.mark.parametrize(("name", "use"), [("text", "texts"), ("prompt", "prompts")])
def test_files_that_are_no_conversations(tmp_path, name, use):
    path = write_jsonl(tmp_path / "a.jsonl", [{name: "some words"}, {name: "more"}])
    found = run(path, json=True)
    assert found["use"] == use and found["total_length"] == len("some wordsmore")
    assert list(found["formats"].values()) == [name]


def test_a_mistake_is_one_line_and_a_hint(tmp_path):
    done = medgpt("data", DATA / "bad" / "truncated_line.jsonl")
    assert done.returncode == 2 and "wrong records: 1" in done.stdout
    written = done.stderr.strip().splitlines()
    assert written[-2].startswith("error: ") and "truncated_line.jsonl:3:" in written[-2]
    assert written[-1].startswith("hint: ")


def test_broken_lines_and_wrong_records_are_all_found(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    good = json.dumps(rows(1)[0]).encode()
    path.write_bytes(
        b"\n".join(
            [good, b'{"question": "a", ', good, b'{"question": "a", "answer": 3}', b"{\x00}", b"[]", good]
        )
    )
    with pytest.raises(DataError, match=r"4 records are wrong, the first at .*a\.jsonl:2: not valid JSON"):
        run(path)
    text = capsys.readouterr().out
    assert "3 used of 7 read" in text and "assistant: ⟦It is 0.⟧" in text
    for line in (2, 4, 5, 6):
        assert f"a.jsonl:{line}: " in text


def test_a_file_that_breaks_off_does_not_hide_the_others(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows(2))[:-9], encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("", encoding="utf-8")
    write_jsonl(tmp_path / "c.jsonl", [*rows(3), {"question": "a"}, {"text": "a"}])
    found = run(tmp_path, json=True)
    assert found["exit_code"] == 2 and found["wrong_total"] == 4 and found["used"] == 4
    assert any("what stands behind row 1 cannot be read" in one for one in found["notices"])


@pytest.mark.parametrize("mixed", [{"prompt": "a"}, {"text": "a"}])
def test_a_record_for_another_use_is_wrong_as_in_training(mixed, tmp_path):
    found = run(write_jsonl(tmp_path / "a.jsonl", [mixed, *rows(3)]), json=True)
    assert found["use"] == "conversations" and found["wrong_total"] == 1
    assert "a.jsonl:1: " in found["wrong"][0]["message"]


# -- writing -----------------------------------------------------------------------------------------------


def test_a_clean_file_is_private_and_never_overwrites(tmp_path):
    path, output = write_jsonl(tmp_path / "a.jsonl", rows(3)), tmp_path / "clean.jsonl"
    old = os.umask(0)
    try:
        report = run(path, output=output, json=True)
    finally:
        os.umask(old)
    assert report["written"]["files"] == {str(output): 3}
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert lines(output)[0] == {
        "messages": [
            {"role": "user", "content": "What is finding 0 of 0?"},
            {"role": "assistant", "content": "It is 0."},
        ]
    }
    before = output.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        run(path, output=output)
    assert output.read_bytes() == before and sorted(one.name for one in tmp_path.iterdir()) == [
        "a.jsonl",
        "clean.jsonl",
    ]


def test_nothing_is_written_of_files_with_mistakes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*rows(3), {"question": "a", "answer": 1}])
    with pytest.raises(DataError, match="1 record is wrong"):
        run(path, output=tmp_path / "clean.jsonl")
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


def test_split_by_question_group_and_near_duplicate(tmp_path):
    all_rows = [{**row, "patient": n // 2} for n, row in enumerate(rows(40))]
    all_rows += [{**row, "answer": "Another answer."} for row in rows(40)[:10]]
    path = write_jsonl(tmp_path / "a.jsonl", all_rows)
    report = run(path, output=tmp_path / "b.jsonl", split="0.8/0.2", group="patient", json=True)
    train, held = lines(tmp_path / "b.train.jsonl"), lines(tmp_path / "b.eval.jsonl")
    assert list(report["written"]["files"].values()) == [len(train), len(held)]
    assert len(train) + len(held) == 50 and len({one["group"] for one in held if "group" in one}) == 4
    assert {one.get("group") for one in train}.isdisjoint({one["group"] for one in held if "group" in one})
    asked = [{one["messages"][0]["content"] for one in part} for part in (train, held)]
    assert asked[0].isdisjoint(asked[1])
    assert any("10 records have no value for it" in one for one in report["notices"])
    assert not (tmp_path / "b.jsonl").exists()


def test_deduplicate_keeps_the_first(tmp_path):
    long = " ".join(f"word{n}" for n in range(60))
    all_rows = [
        {"question": "a?", "answer": "b", "id": "1"},
        {"instruction": "a?", "output": "b", "id": "2"},  # the same in another shape
        {"question": long, "answer": "yes", "id": "3"},
        {"question": f"{long} indeed", "answer": "yes", "id": "4"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", all_rows)
    report = run(path, output=tmp_path / "b.jsonl", deduplicate=True, json=True)
    assert report["written"]["left_out"] == {"exact": 1, "near": 1}
    assert [one["id"] for one in lines(tmp_path / "b.jsonl")] == ["1", "3"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"split": "0.9/0.2", "output": "b.jsonl"}, "--split 0.9/0.2"),
        ({"split": "0.9", "output": "b.jsonl"}, "--split 0.9"),
        ({"split": "1/0", "output": "b.jsonl"}, "--split 1/0"),
        ({"split": "0.9/0.1"}, "--split is about the file"),
        ({"deduplicate": True}, "--deduplicate is about the file"),
        ({"output": "b.csv"}, "JSON lines"),
        ({"output": "none/b.jsonl"}, "no such folder"),
        ({"text_unit": "block"}, "--text-unit block"),
    ],
)
def test_options_that_do_not_fit(options, word, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(4))
    if "output" in options:
        options = {**options, "output": tmp_path / options["output"]}
    with pytest.raises(UsageError, match=word):
        run(path, **options)


def test_one_question_cannot_be_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a?", "answer": str(n)} for n in range(5)])
    with pytest.raises(UsageError, match="belong together"):
        run(path, output=tmp_path / "b.jsonl", split="0.8/0.2", json=True)
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


# -- strict, ignore and group ------------------------------------------------------------------------------


def test_strict_ignore_and_group(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(3, ward=7))
    with pytest.raises(DataError, match=r"--strict: nothing is made of ward \(3 records\)"):
        run(path, strict=True)
    found = run(path, strict=True, ignore=("ward", "bed"), json=True)
    assert "--ignore bed: no record has this key" in found["notices"]
    assert found["unused"][0]["accepted"] and "exit_code" not in found
    assert run(path, group="ward", json=True)["groups"] == {"records": 3, "groups": 1}
    with pytest.raises(DataError, match="--group bed: no record has this key"):
        run(path, group="bed")


@pytest.mark.parametrize("command", ["sft", "reward", "rl", "pretrain"])
def test_training_is_as_strict(command, tmp_path):
    row = {
        "sft": {"question": "a?", "answer": "b"},
        "reward": {"prompt": "a?", "chosen": "b", "rejected": "c"},
        "rl": {"prompt": "a?"},
        "pretrain": {"text": "some text"},
    }[command]
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "ward": n} for n in range(3)])
    model = tiny_model(tmp_path / "model")
    more = ["--reward-rule", "length:1", "--algorithm", "grpo"] if command == "rl" else []
    asked = [command, "--base-model", model, "--train-data", path, "--dry-run", *more]
    done = medgpt(*asked, "--strict")
    assert done.returncode == 2 and "--strict: nothing is made of ward" in done.stderr, done.stderr
    done = medgpt(*asked)
    assert done.returncode == 0, done.stderr
    done = medgpt(*asked, "--strict", "--ignore", "ward")
    assert done.returncode == 0, done.stderr
