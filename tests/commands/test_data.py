"""`medgpt data` as a program."""

from __future__ import annotations

import json

import pytest

from tests.cli import medgpt
from tests.conftest import DATA
from tests.tiny import tiny_model, write_jsonl


def test_with_a_model(tmp_path):
    model = tiny_model(tmp_path / "model")
    done = medgpt("data", DATA / "mts_dialog_en_messages.jsonl", "--base-model", model, "--max-length", 8192)
    assert done.returncode == 0, done.stderr
    assert "40 used of 40 read" in done.stdout and "messages" in done.stdout
    assert "length in tokens" in done.stdout and "⟦" in done.stdout


def test_json_holds_counts_and_no_record(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "fever-word", "answer": "rest-word"}])
    done = medgpt("data", path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["used"] == 1 and found["unit"] == "characters" and list(found["formats"].values()) == ["qa"]
    assert "fever-word" not in done.stdout + done.stderr


@pytest.mark.parametrize(("name", "format_"), [("text", "text"), ("prompt", "prompt")])
def test_files_that_are_no_conversations(tmp_path, name, format_):
    path = write_jsonl(tmp_path / "a.jsonl", [{name: "some words"}, {name: "more"}])
    done = medgpt("data", path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["formats"].values()) == [format_] and found["total_length"] == len("some wordsmore")


def test_a_mistake_is_one_line_and_a_hint(tmp_path):
    done = medgpt("data", DATA / "bad" / "truncated_line.jsonl")
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert lines[-2].startswith("error: ") and "truncated_line.jsonl:3:" in lines[-2]
    assert lines[-1].startswith("hint: ")
