"""The course of the learning rate: the first update of a stage learns already, and each has the rate that it should."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli import medgpt
from tests.engine.training.test_sft import weights
from tests.tiny import tiny_model, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rate")
    tiny_model(folder / "model")
    rows = [{"question": f"What is {n}?", "answer": f"The answer is {n}."} for n in range(32)]
    write_jsonl(folder / "sft.jsonl", rows)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["question"]} for row in rows])
    pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "No."} for row in rows]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "text.jsonl", [{"text": row["answer"]} for row in rows])
    return folder


STAGES = {
    "pretrain": ("--train-data", "text.jsonl", "--block-size", "16"),
    "sft": ("--train-data", "sft.jsonl", "--eval-questions", "0"),
    "reward": ("--train-data", "pairs.jsonl"),
    "rl": (
        *("--train-data", "prompts.jsonl", "--reward-model", "one-reward", "--max-new-tokens", "4"),
        *("--batch-size", "4", "--minibatch-size", "4", "--eval-prompts", "1", "--sample-answers", "0"),
    ),
}


def run(place: Path, stage: str, name: str, *more: object, base: str = "model"):
    arguments = (stage, "--base-model", base, *STAGES[stage], "--use-cpu", "--output-dir", name)
    return medgpt(*arguments, *more, cwd=place)


def rates(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "loss" in line]


@pytest.mark.parametrize("stage", STAGES)
def test_a_single_update_trains(stage: str, place: Path) -> None:
    """An adapter's B begins at zero, so that it is zero after an update at rate 0. The reward model is rl's."""
    done = run(place, stage, f"one-{stage}", "--max-steps", "1", "--learning-rate", "0.01")
    assert done.returncode == 0, done.stderr
    second = {name: weight for name, weight in weights(place / f"one-{stage}").items() if "lora_B" in name}
    assert second and all(weight.abs().max() > 1e-5 for weight in second.values())
    assert rates(place / f"one-{stage}") == [0.01]


@pytest.mark.parametrize(
    ("flags", "factors"),
    [
        # 4 updates of warm-up, then a cosine, a line or nothing over the 6 that are left.
        (("--schedule", "constant", "--warmup-steps", "4"), [1 / 4, 1 / 2, 3 / 4, 1, 1, 1, 1, 1, 1, 1]),
        (
            ("--schedule", "linear", "--warmup-steps", "4"),
            [1 / 4, 1 / 2, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
        ),
        (
            ("--warmup-ratio", "0.4"),
            [1 / 4, 1 / 2, 3 / 4, 1, 1, (2 + 3**0.5) / 4, 3 / 4, 1 / 2, 1 / 4, (2 - 3**0.5) / 4],
        ),
        (("--schedule", "linear", "--warmup-steps", "0"), [1 - n / 10 for n in range(10)]),
        (("--warmup-ratio", "1"), [n / 10 for n in range(1, 11)]),
        # 3 % of 10 updates is one
        (
            ("--log-steps", "1"),
            [1, *(0.5 + 0.5 * math.cos(math.pi * n / 9) for n in range(9))],
        ),
    ],
)
def test_the_rates_are_those_worked_by_hand(flags: tuple, factors: list[float], place: Path) -> None:
    name = "-".join(flags)
    done = run(place, "sft", name, "--max-steps", "10", "--learning-rate", "0.02", *flags)
    assert done.returncode == 0, done.stderr
    assert rates(place / name) == pytest.approx([0.02 * factor for factor in factors], rel=1e-9)


def test_an_update_takes_the_step_that_its_rate_says(place: Path) -> None:
    """AdamW's first step is as long as the rate, whatever the gradient: what is logged is what was done."""
    flags = ("--max-steps", "4", "--warmup-steps", "4", "--save-steps", "1", "--keep-checkpoints", "4")
    done = run(place, "sft", "step", *flags, "--learning-rate", "0.01")
    assert done.returncode == 0, done.stderr
    first = load_file(place / "step" / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")
    moved = max(float(weight.abs().max()) for name, weight in first.items() if "lora_B" in name)
    assert moved == pytest.approx(0.01 / 4, rel=1e-3)
    assert rates(place / "step")[0] == 0.01 / 4


def test_a_resumed_run_goes_on_with_the_warm_up(place: Path) -> None:
    flags = ("--max-steps", "8", "--warmup-steps", "6", "--save-steps", "2", "--keep-checkpoints", "9")
    done = run(place, "sft", "unbroken", *flags)
    assert done.returncode == 0, done.stderr
    whole, last = rates(place / "unbroken"), weights(place / "unbroken")
    for step in (4, 6, 8):
        (place / "unbroken" / "checkpoints" / f"checkpoint-{step}").rename(place / f"gone-{step}")
    manifest = json.loads((place / "unbroken" / "run.json").read_text())
    (place / "unbroken" / "run.json").write_text(json.dumps({**manifest, "status": "stopped"}))
    (place / "unbroken" / "model").rename(place / "gone-model")
    done = medgpt("sft", "--resume", "unbroken", cwd=place)
    assert done.returncode == 0, done.stderr
    assert rates(place / "unbroken") == whole
    assert all((weight == last[name]).all() for name, weight in weights(place / "unbroken").items())


def test_warm_up_is_said_in_one_way_and_fits_the_run(place: Path) -> None:
    done = run(place, "sft", "both", "--warmup-steps", "4", "--warmup-ratio", "0.1")
    assert done.returncode == 2, done.stderr
    assert "--warmup-steps and --warmup-ratio contradict each other" in done.stderr
    done = run(place, "sft", "long", "--warmup-steps", "9", "--max-steps", "8")
    assert done.returncode == 2, done.stderr
    assert "--warmup-steps 9" in done.stderr and "8 updates" in done.stderr
    assert not (place / "both").exists() and not (place / "long").exists()
