"""One run in two processes: the same batches, losses and weights as in one; ended, killed and gone on with together."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli import medgpt, start
from tests.tiny import tiny_model, write_jsonl

# 10 updates of 4; the last batch of each epoch is a short one, of one example.
COMMON = ("--max-steps", "10", "--lora-dropout", "0", "--learning-rate", "0.005", "--save-steps", "3")
STAGES = {
    "sft": ("--train-data", "talk.jsonl", "--eval-fraction", "0", "--gradient-accumulation", "2"),
    "pretrain": ("--train-data", "text.jsonl", "--eval-fraction", "0.1", "--block-size", "32"),
    "reward": ("--train-data", "pairs.jsonl", "--eval-fraction", "0.2"),
    "rl": (
        *("--reward-model", "rm", "--train-data", "prompts.jsonl", "--eval-fraction", "0.2"),
        *("--minibatch-size", "4", "--max-new-tokens", "6", "--ppo-epochs", "2", "--kl-target", "3"),
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    tiny_model(folder / "model", seed=4)
    words = ["fever", "cough", "头痛", "diet", "rest", "sleep", "pain"]
    rows = [{"prompt": f"What about {word} {n}?"} for n in range(3) for word in words]
    write_jsonl(folder / "prompts.jsonl", rows)
    talk = [
        {"question": row["prompt"], "answer": "Rest and drink. " * (1 + n % 3)} for n, row in enumerate(rows)
    ]
    write_jsonl(folder / "talk.jsonl", talk)
    write_jsonl(folder / "text.jsonl", [{"text": row["prompt"] * 9} for row in rows])
    pairs = [{**row, "chosen": "Please rest. " * 2, "rejected": f"no {n}"} for n, row in enumerate(rows)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    made = medgpt(
        *("reward", "--base-model", "model", "--train-data", "pairs.jsonl", "--eval-fraction", "0.2"),
        *("--max-steps", "4", "--learning-rate", "0.01", "--output-dir", "rm"),
        cwd=folder,
    )
    assert made.returncode == 0, made.stderr
    return folder


def arguments(stage: str, run: str, count: int, *more: object) -> tuple[object, ...]:
    flags = ("--processes", count, "--batch-size", 4 // count, "--output-dir", run, "--use-cpu")
    return (stage, "--base-model", "model", *STAGES[stage], *COMMON, *flags, *more)


def curve(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = ("seconds", "_per_second")
    return [
        {name: value for name, value in line.items() if not name.endswith(left_out)}
        for line in lines
        if "loss" in line
    ]


def assert_the_same(one: Path, two: Path) -> None:
    first, second = curve(one), curve(two)
    assert [line["step"] for line in first] == [line["step"] for line in second] == list(range(1, 11))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # Sums over other shares are other roundings; clipped shares and correlations jump with them.
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5 if name == "loss" else 2e-3), name
    weights = [load_file(run / "model" / "adapter_model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=2e-4), name
    assert any(float(weight.abs().max()) > 1e-3 for name, weight in weights[0].items() if "lora_B" in name)


@pytest.mark.parametrize(
    "stage",
    [stage if stage == "sft" else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES],
)
def test_two_processes_are_one_run(place: Path, stage: str) -> None:
    for count in (1, 2):
        done = medgpt(*arguments(stage, f"{stage}-{count}", count), cwd=place)
        assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert done.stderr.count("step 10/10") == 1  # one of them speaks
    assert_the_same(place / f"{stage}-1", place / f"{stage}-2")
    held_out = [json.loads((place / f"{stage}-{n}/run.json").read_text())["result"]["after"] for n in (1, 2)]
    for name, value in held_out[0].items():
        if name in ("loss", "reward", "kl", "accuracy"):
            assert value == pytest.approx(held_out[1][name], abs=1e-3), name


def members(process) -> list[int]:
    """The processes that a command has started, in the order of their ranks."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if parent == process.pid:
            found[next(int(one[5:]) for one in variables if one.startswith(b"RANK="))] = int(folder.name)
    return [found[number] for number in sorted(found)]


def running(place: Path, run: str, steps: int, *more: object):
    """A run of two processes that has got so far."""
    process = start(*arguments("sft", run, 2, "--max-steps", "400", *more), cwd=place)
    log = place / run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= steps):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def gone(numbers: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{number}").exists() for number in numbers) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{number}").exists() for number in numbers)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_the_run_with_one_word(place: Path, which: int) -> None:
    process = running(place, f"killed-{which}", 5)
    ranks = members(process)
    assert len(ranks) == 2
    os.kill(ranks[which], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"process {which + 1} of 2 was ended by SIGKILL" in said
    assert said.count("error:") == 1 and "Traceback" not in said
    assert gone(ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_with_a_checkpoint(place: Path, number: int, code: int) -> None:
    run = f"stopped-{code}"
    process = running(place, run, 5)
    ranks = members(process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "a checkpoint is saved" in said and f"--resume {run}" in said
    assert said.count("error:") <= 1 and gone(ranks)
    assert json.loads((place / run / "run.json").read_text())["status"] == "stopped"
    assert list((place / run / "checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
def test_goes_on_in_another_number_of_processes(place: Path) -> None:
    """Stopped in two, gone on with in one: the weights of a run that was never stopped."""
    whole = medgpt(*arguments("sft", "whole", 1, "--max-steps", "40"), cwd=place)
    assert whole.returncode == 0, whole.stderr
    process = start(*arguments("sft", "halves", 2, "--max-steps", "40"), cwd=place)
    log = place / "halves" / "metrics.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) >= 4):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    odd = medgpt("sft", "--resume", "halves", "--processes", "3", "--use-cpu", cwd=place)
    assert odd.returncode == 2 and "divide" in odd.stderr and odd.stderr.count("error:") == 1
    done = medgpt("sft", "--resume", "halves", "--use-cpu", cwd=place)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(place / run / "model/adapter_model.safetensors") for run in ("whole", "halves"))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=2e-4), name


def test_what_does_not_go_together_is_said(place: Path) -> None:
    data = ("--base-model", "model", "--train-data", "talk.jsonl")
    done = medgpt("sft", *data, "--processes", "2", "--gpus", "0", cwd=place)
    assert done.returncode == 2 and "contradict" in done.stderr
    (place / "p.yaml").write_text(
        "output-dir: pipe\nsteps:\n  sft: {base-model: model, train-data: [talk.jsonl], processes: 2}\n"
    )
    done = medgpt("pipeline", "--recipe", "p.yaml", cwd=place)
    assert done.returncode == 2 and "inside a pipeline" in done.stderr, done.stderr
    done = medgpt("sft", *data, "--processes", "2", "--output-dir", "model", "--use-cpu", cwd=place)
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr
