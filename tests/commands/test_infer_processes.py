"""`medgpt infer --processes`: one ordered file, the bytes of a single process; killed, stopped and gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.cli import medgpt, start
from tests.engine.training.test_processes import gone, members
from tests.tiny import tiny_model, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    tiny_model(folder / "model", seed=3)
    # questions of many lengths; some stand twice, one is too long
    rows = [{"prompt": f"{'why ' * (n % 9)}What is disease {n % 40}?"} for n in range(60)]
    write_jsonl(folder / "in.jsonl", [*rows, {"prompt": "fever " * 900}])
    write_jsonl(folder / "two.jsonl", rows[:2])
    write_jsonl(folder / "many.jsonl", [{"prompt": f"Question {n}?"} for n in range(800)])
    return folder


def arguments(data: str, file: str, count: int, *more: object) -> tuple[object, ...]:
    flags = ("--data-file", data, "--predictions-file", file, "--processes", count, "--max-context", 400)
    return ("infer", "--base-model", "model", "--use-cpu", "--max-new-tokens", 24, *flags, *more)


def infer(place: Path, *given: object):
    done = medgpt(*arguments(*given), cwd=place)
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_write_the_file_of_one(place: Path):
    found = [json.loads(infer(place, "in.jsonl", f"{n}.jsonl", n, "--json").stdout) for n in (1, 2)]
    assert (place / "2.jsonl").read_bytes() == (place / "1.jsonl").read_bytes()
    for name in ("rows", "failed", "completion_tokens"):
        assert found[0][name] == found[1][name]
    assert found[1]["rows"] == 61 and found[1]["failed"] == 1
    assert not list(place.glob("*.partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["out.json", "-"])
@pytest.mark.parametrize("more", [(), ("--temperature", "0.9", "--top-p", "0.9", "--batch-size", "5")])
def test_three_processes_write_the_file_of_one(place: Path, file: str, more: tuple[str, ...]):
    """Arrays and standard output, too; draws depend on the question alone."""
    written = []
    for count in (1, 3):
        done = infer(place, "in.jsonl", file, count, *more, *(() if file == "-" else ("--overwrite",)))
        written.append(done.stdout if file == "-" else (place / file).read_text())
        assert done.stderr.count("61 rows") == 1  # one process speaks
    assert written[0] == written[1] != ""


@pytest.mark.slow
def test_fewer_questions_than_processes(place: Path):
    for count in (1, 3):
        infer(place, "two.jsonl", f"two-{count}.json", count)
    assert (place / "two-3.json").read_bytes() == (place / "two-1.json").read_bytes()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--endpoint", "http://127.0.0.1:9", "--data-file", "two.jsonl"), "--endpoint"),
        (("--base-model", "model", "--data-file", "-"), "pipe"),
        (("--base-model", "model", "--data-file", "two.jsonl", "--gpus", "0"), "contradict"),
    ],
)
def test_what_does_not_go_together_is_said(place: Path, flags: tuple[str, ...], word: str):
    done = medgpt("infer", *flags, "--predictions-file", "never.json", "--processes", "2", cwd=place)
    assert done.returncode == 2 and word in done.stderr and done.stderr.count("error:") == 1, done.stderr
    assert not (place / "never.json").exists()


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_all_with_one_word(place: Path):
    (place / "there.json").write_text("precious")
    done = medgpt(*arguments("two.jsonl", "there.json", 2), cwd=place)
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr
    assert "exists already" in done.stderr and (place / "there.json").read_text() == "precious"


def running(place: Path, file: str, count: int, answers: int, *more: object):
    """A run that has so many more answers on the disk."""
    partial = place / f"{file}.partial"
    lines = partial.read_bytes().count(b"\n") if partial.exists() else 1
    process = start(*arguments("many.jsonl", file, count, "--batch-size", "1", *more), cwd=place)
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= lines + answers):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process, members(process)


def kept(place: Path, file: str) -> list[int]:
    """The numbers of the questions whose answers are on the disk."""
    whole = (place / f"{file}.partial").read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line)["number"] for line in whole]


@pytest.fixture(scope="module")
def whole(place: Path) -> bytes:
    infer(place, "many.jsonl", "whole.jsonl", 1)
    return (place / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on_in_another_number(place: Path, whole: bytes, number: int, code: int):
    file = f"stopped-{code}.jsonl"
    process, ranks = running(place, file, 2, 8)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.count("error:") == 1 and "Traceback" not in said and "--resume" in said
    assert gone(ranks) and len(ranks) == 2
    before = kept(place, file)
    assert f"{len(before)} of 800 answers are in {file}.partial" in said
    done = infer(place, "many.jsonl", file, 1, "--resume", "--json")
    assert json.loads(done.stdout)["resumed"] == len(before) == len(set(before))
    assert (place / file).read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_killed_process_ends_the_run_with_one_word(place: Path, whole: bytes, which: int):
    file = f"killed-{which}.jsonl"
    process, ranks = running(place, file, 3, 20)
    os.kill(ranks[which], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"process {which + 1} of 3 was ended by SIGKILL" in said
    assert said.count("error:") == 1 and "Traceback" not in said
    assert gone(ranks) and len(kept(place, file)) >= 20
    infer(place, "many.jsonl", file, 2, "--resume")
    assert (place / file).read_bytes() == whole


@pytest.mark.slow
def test_all_killed_again_and_again(place: Path, whole: bytes):
    draw = random.Random(5)
    for kill, count in enumerate((3, 1, 2, 3)):
        more = ("--resume",) if kill else ()
        process, ranks = running(place, "storm.jsonl", count, draw.randint(10, 60), *more)
        for number in draw.sample([process.pid, *ranks], len(ranks) + 1):
            os.kill(number, signal.SIGKILL)
        process.communicate()
        assert gone(ranks)
        numbers = kept(place, "storm.jsonl")
        assert len(numbers) == len(set(numbers))
    infer(place, "many.jsonl", "storm.jsonl", 2, "--resume")
    assert (place / "storm.jsonl").read_bytes() == whole
