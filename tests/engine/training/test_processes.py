"""One run in two processes: the same batches, losses and weights as in one; ended, killed and gone on with together."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.cli import medgpt, start
from tests.engine.model.architectures import make_model, write_data
from tests.engine.training.several import (
    STAGES,
    arguments,
    assert_equal_weights,
    assert_the_same,
    gone,
    held_out,
    make_place,
    members,
    running,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("together"))


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
    measured = [held_out(place / f"{stage}-{n}") for n in (1, 2)]
    for name, value in measured[0].items():
        if name in ("loss", "reward", "kl", "accuracy"):
            assert value == pytest.approx(measured[1][name], abs=1e-3), name


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
    done = medgpt("sft", "--resume", "halves", "--processes", "1", "--use-cpu", cwd=place)
    assert done.returncode == 0, done.stderr
    assert_equal_weights(place / "whole", place / "halves", 2e-4)


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


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--tuning", "full")])
def test_layers_that_no_gradient_reaches_hold_up_nobody(tmp_path: Path, more: tuple[str, ...]) -> None:
    """BART as a decoder has attention to an encoder that is not there; the second update waited for its gradient."""
    make_model("bart", tmp_path / "model")
    write_data(tmp_path)
    done = medgpt(
        *("sft", "--base-model", "model", "--train-data", "sft.jsonl", "--eval-fraction", "0", "--use-cpu"),
        *("--max-steps", "3", "--batch-size", "1", "--processes", "2", "--json", *more),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
