"""`medgpt infer` as a user runs it."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from tests.cli import medgpt, start
from tests.tiny import tiny_model, write_jsonl

SHORT = ("--max-new-tokens", "12")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("infer")
    tiny_model(folder / "model", seed=3)
    (folder / "in.txt").write_text("What is fever?\n\n感冒怎么办？\nWhy? \u2028 really\n", encoding="utf-8")
    return folder


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def infer(place: Path, *more: object, **options):
    return medgpt("infer", "--base-model", "model", *SHORT, *more, cwd=place, **options)


def test_text_in_json_out(place: Path):
    done = infer(place, "--data-file", "in.txt", "--predictions-file", "out.json", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "out.json").read_text())
    assert [row["input"] for row in rows] == ["What is fever?", "感冒怎么办？", "Why? \u2028 really"]
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert set(row) == {"id", "input", "output", "finish_reason", "prompt_tokens", "completion_tokens"}
    assert json.loads(done.stdout)["rows"] == 3
    assert not list(place.glob("*.partial"))


def test_jsonl_forms_keep_order_and_ids(place: Path):
    rows = [
        {"id": "a", "prompt": "What is fever?"},
        {"question": "Longer " * 20},
        {"id": 7, "instruction": "感冒怎么办？"},
        {"messages": [user("Hi"), {"role": "assistant", "content": "Yes"}, user("So?")]},
    ]
    write_jsonl(place / "in.jsonl", rows)
    done = infer(place, "--data-file", "in.jsonl", "--predictions-file", "out.jsonl", "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == ["a", "2", "7", "4"]
    assert found[3]["input"] == rows[3]["messages"]


def test_standard_input_and_output(place: Path):
    done = infer(place, "--data-file", "-", "--predictions-file", "-", input="What is fever?\n感冒怎么办？\n")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.split("\n") if line]
    assert [row["input"] for row in rows] == ["What is fever?", "感冒怎么办？"]


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ('{"id": "x", "prompt": "What is fever?"}\n\n{"question": "Why?"}\n', ["What is fever?", "Why?"]),
        ('[\n {"prompt": "What is fever?"},\n {"prompt": "Why?"}\n]\n', ["What is fever?", "Why?"]),
        ("[a] What is fever?\r\nWhy?", ["[a] What is fever?", "Why?"]),
    ],
)
def test_standard_input_is_read_as_what_it_is(place: Path, text: str, inputs: list[str]):
    done = infer(
        place, "--data-file", "-", "--predictions-file", "-", input=text, env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["input"] for line in done.stdout.split("\n") if line] == inputs


def test_a_file_without_an_ending_is_read_as_what_it_is(place: Path):
    (place / "questions").write_text("What is fever?\nWhy?\n")
    done = infer(place, "--data-file", "questions", "--predictions-file", "-")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["input"] for line in done.stdout.split("\n") if line] == [
        "What is fever?",
        "Why?",
    ]


def test_a_conversation_that_the_template_refuses_is_an_error_field(place: Path):
    tiny_model(place / "strict", style="gemma", seed=3)
    opened = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}]
    write_jsonl(place / "roles.jsonl", [{"messages": opened}, {"prompt": "What is fever?"}])
    done = medgpt(
        *(
            "infer",
            "--base-model",
            "strict",
            "--data-file",
            "roles.jsonl",
            "--predictions-file",
            "roles.json",
        ),
        *SHORT,
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "roles.json").read_text())
    assert "roles" in rows[0]["error"] and rows[1]["output"] and "error" not in rows[1]


def test_raw_text_is_continued_and_differs_from_the_template(place: Path):
    outputs = []
    for flag in ("--no-prompt", "--with-prompt"):
        done = infer(place, "--data-file", "in.txt", "--predictions-file", "-", flag)
        assert done.returncode == 0, done.stderr
        outputs.append([json.loads(line) for line in done.stdout.split("\n") if line])
    assert outputs[0][0]["prompt_tokens"] < outputs[1][0]["prompt_tokens"]
    assert outputs[0][0]["output"] != outputs[1][0]["output"]


def test_a_model_without_a_template_continues_raw_text_by_default(place: Path):
    tiny_model(place / "bare", style="none")
    said = {}
    for flags in ((), ("--no-prompt",), ("--with-prompt",)):
        done = medgpt(
            *(
                "infer",
                "--base-model",
                "bare",
                *SHORT,
                "--data-file",
                "in.txt",
                "--predictions-file",
                "-",
                *flags,
            ),
            cwd=place,
        )
        assert done.returncode == 0, done.stderr
        said[flags] = done.stdout
        assert ("plain" in done.stderr) == (flags == ("--with-prompt",))  # the fallback template is named
    assert said[()] == said[("--no-prompt",)] != said[("--with-prompt",)]


def test_a_prompt_that_is_too_long_is_an_error_field(place: Path):
    write_jsonl(place / "long.jsonl", [{"prompt": "fever " * 900}, {"prompt": "What is fever?"}])
    done = infer(
        place, "--data-file", "long.jsonl", "--predictions-file", "long.json", "--max-context", "200"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "long.json").read_text())
    assert "context 200" in rows[0]["error"] and rows[0]["output"] == ""
    assert rows[1]["output"]
    assert "1 of 2" in done.stderr
    all_fail = infer(
        place, "--data-file", "long.jsonl", "--predictions-file", "all.json", "--max-context", "16"
    )
    assert all_fail.returncode == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "x"}\n{"prompt": 3}\n', "bad.jsonl:2"),
        ('{"prompt": "x"}\n{"prompt": "y"\n', "bad.jsonl:2"),
        ('{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}\n', "bad.jsonl:2"),
        ("", "bad.jsonl"),
    ],
)
def test_bad_questions_are_named(place: Path, content: str, message: str):
    (place / "bad.jsonl").write_text(content)
    done = infer(place, "--data-file", "bad.jsonl", "--predictions-file", "never.json")
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (place / "never.json").exists()


def test_an_existing_file_is_not_overwritten_without_a_word(place: Path):
    (place / "mine.json").write_text("precious")
    done = infer(place, "--data-file", "in.txt", "--predictions-file", "mine.json")
    assert done.returncode == 2 and (place / "mine.json").read_text() == "precious"
    assert (
        infer(place, "--data-file", "in.txt", "--predictions-file", "mine.json", "--overwrite").returncode
        == 0
    )
    assert len(json.loads((place / "mine.json").read_text())) == 3


def test_the_greedy_answer_is_that_of_chat_and_of_interactive(place: Path):
    done = infer(place, "--data-file", "-", "--predictions-file", "-", input="What is fever?\n")
    ours = json.loads(done.stdout)["output"]
    chat = medgpt("chat", "--base-model", "model", *SHORT, cwd=place, input="What is fever?\n")
    single = infer(place, "--interactive", input="What is fever?\n")
    assert chat.stdout == single.stdout == ours + "\n"


def killed_and_resumed(place: Path, name: str, kills: int, questions: int, seed: int) -> None:
    """SIGKILL `infer` at random moments, resume each time, and compare with an uninterrupted run."""
    rows = [{"prompt": f"{'why ' * (n % 9)}What is disease {n}?"} for n in range(questions)]
    write_jsonl(place / f"{name}-in.jsonl", rows)
    options = ("--data-file", f"{name}-in.jsonl", "--batch-size", "2", "--max-new-tokens", "24")
    whole = infer(place, *options, "--predictions-file", f"{name}-whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    draw = random.Random(seed)
    partial = place / f"{name}.jsonl.partial"
    for kill in range(kills):
        more = ("--resume",) if kill else ()
        process = start(
            *("infer", "--base-model", "model", *options, "--predictions-file", f"{name}.jsonl", *more),
            cwd=place,
        )
        lines = partial.read_bytes().count(b"\n") if partial.exists() else 0
        wanted = lines + draw.randint(1, max(questions // (kills + 2), 1))
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < wanted):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (place / f"{name}.jsonl").exists(), "the run ended before it could be killed"
        if draw.random() < 0.5:  # a torn last line, as a power cut leaves it
            partial.write_bytes(partial.read_bytes()[:-7])
    done = infer(place, *options, "--predictions-file", f"{name}.jsonl", "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] > 0
    assert (place / f"{name}.jsonl").read_bytes() == (place / f"{name}-whole.jsonl").read_bytes()


def test_killed_once_and_resumed(place: Path):
    killed_and_resumed(place, "once", kills=1, questions=60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_five_times_and_resumed(place: Path, seed: int):
    killed_and_resumed(place, f"five{seed}", kills=5, questions=400, seed=seed)


def stopped_by(number: signal.Signals, place: Path, name: str):
    """Start a run of 400 questions and send it a signal when the first answers are on the disk."""
    write_jsonl(place / "many.jsonl", [{"prompt": f"Question {n}?"} for n in range(400)])
    options = ("--data-file", "many.jsonl", "--predictions-file", name, "--batch-size", "1")
    process = start("infer", "--base-model", "model", *options, cwd=place)
    partial = place / f"{name}.partial"
    while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 3):
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert not (place / name).exists(), "the run ended before it could be stopped"
    return process.returncode, said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(place: Path, number: signal.Signals, code: int):
    returned, said = stopped_by(number, place, f"stopped{code}.json")
    assert returned == code
    assert f"answers are in stopped{code}.json.partial" in said and "--resume" in said
    assert "Traceback" not in said


def test_a_resume_of_another_run_is_refused(place: Path):
    stopped_by(signal.SIGKILL, place, "other.jsonl")
    options = ("--data-file", "many.jsonl", "--predictions-file", "other.jsonl")
    assert infer(place, *options).returncode == 2  # what is left is not thrown away without a word
    done = infer(place, *options, "--resume", "--max-new-tokens", "3")
    assert done.returncode == 2 and "--max-new-tokens changed" in done.stderr
