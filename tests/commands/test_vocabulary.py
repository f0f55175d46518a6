"""`medgpt vocabulary` as a program, and its model in the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli import medgpt
from tests.engine.model.tiny_tokenizers import corpus
from tests.tiny import tiny_model, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    tiny_model(folder / "base")
    write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in corpus()])
    return folder


def run(place: Path, *more: object, output: str = "wider"):
    return medgpt(
        *("vocabulary", "--base-model", "base", "--train-data", "corpus.jsonl", "--output-dir", output),
        *("--size", 180, "--min-count", 3, *more),
        cwd=place,
    )


def test_the_widened_model_answers_and_the_folder_is_not_overwritten(place: Path) -> None:
    done = run(place, "--check-data", "corpus.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wider\n"
    for words in ("new tokens", "medical terms", "tokens/char.", "Chinese", "English", "患者", "exactly"):
        assert words in done.stderr
    assert "secretword" not in done.stderr and "独一无二" not in done.stderr  # rarer than --min-count
    assert ".cc(" not in done.stderr and "LOG" not in done.stderr  # nothing of SentencePiece's own
    again = run(place)
    assert again.returncode == 2 and "exists already" in again.stderr and again.stdout == ""

    (place / "in.txt").write_text("患者咳嗽怎么办？\nWhat is hypertension?\n", encoding="utf-8")
    answered = medgpt(
        *("infer", "--base-model", "wider", "--data-file", "in.txt", "--predictions-file", "out.jsonl"),
        *("--max-new-tokens", 8, "--use-cpu"),
        cwd=place,
    )
    assert answered.returncode == 0, answered.stderr
    lines = [json.loads(line) for line in (place / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2
    shown = medgpt("data", "corpus.jsonl", "--base-model", "wider", "--json", cwd=place)
    plain = medgpt("data", "corpus.jsonl", "--base-model", "base", "--json", cwd=place)
    assert json.loads(shown.stdout)["total_length"] < 0.7 * json.loads(plain.stdout)["total_length"]


def test_json_is_one_object_and_nothing_else(place: Path) -> None:
    done = run(place, "--json", "--algorithm", "unigram", output="as-json")
    assert done.returncode == 0 and done.stderr == ""
    report = json.loads(done.stdout)
    assert report["folder"] == "as-json" and report["sentencepiece"]["algorithm"] == "unigram"
    record = json.loads((place / "as-json" / "vocabulary.json").read_text(encoding="utf-8"))
    assert {**record["report"], "folder": "as-json"} == report


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output-dir", "x"], "--train-data is missing"),
        (["--train-data", "corpus.jsonl"], "--output-dir is missing"),
        (["--train-data", "none.jsonl", "--output-dir", "x"], "none.jsonl: no such file"),
        (
            ["--train-data", "corpus.jsonl", "--output-dir", "x", "--sentencepiece-model", "corpus.jsonl"],
            "not a SentencePiece model",
        ),
        (
            [
                "--train-data",
                "corpus.jsonl",
                "--output-dir",
                "x",
                "--sentencepiece-model",
                "m",
                "--size",
                "900",
            ],
            "--size is about training",
        ),
    ],
)
def test_mistakes_are_one_line_and_a_hint(place: Path, arguments: list[str], words: str) -> None:
    done = medgpt("vocabulary", "--base-model", "base", *arguments, cwd=place)
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("hint: ") and not (place / "x").exists()
