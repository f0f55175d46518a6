"""Runs in several processes beside the same run in one: what the tests of both share."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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
        # Ten times the rate of the policy makes differences of rounding grow a hundredfold in five steps here.
        *("--value-learning-rate", "0.005"),
    ),
}


def make_place(folder: Path) -> Path:
    """A folder with a tiny model, a reward model over it, and data for all stages."""
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
    """A run in `count` processes whose batches are those of one process."""
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
    """The losses of all steps within 1e-5, what they measure, the final weights and, of a language model, logits."""
    first, second = curve(one), curve(two)
    assert [line["step"] for line in first] == [line["step"] for line in second] == list(range(1, 11))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=0, abs=1e-5)
        for name in a:
            # Sums over other shares are other roundings; correlations jump with them, and one token of 48 at the very
            # border of a clip range may be counted on either side.
            spread = 0.03 if name.endswith("clip_fraction") else 2e-3
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=spread), name
    assert_equal_weights(one, two, 2e-4)
    if (one / "model" / "reward.json").is_file():
        return
    answers = [logits_of(run) for run in (one, two)]
    assert torch.allclose(*answers, rtol=0, atol=1e-4), (answers[0] - answers[1]).abs().max()
    untrained = logits_of(one, trained=False)
    assert not torch.allclose(answers[0], untrained, rtol=0, atol=1e-2)  # something was learnt


def assert_equal_weights(one: Path, two: Path, tolerance: float) -> None:
    """The files of both runs hold the same weights under the same names; bit for bit where `tolerance` is 0."""
    names = ("adapter_model.safetensors", "model.safetensors")
    found = [
        load_file(next(run / "model" / name for name in names if (run / "model" / name).is_file()))
        for run in (one, two)
    ]
    assert found[0].keys() == found[1].keys()
    for name, weight in found[0].items():
        assert weight.dtype == found[1][name].dtype
        assert torch.allclose(weight, found[1][name], rtol=0, atol=tolerance), name


@torch.no_grad()
def logits_of(run: Path, trained: bool = True) -> torch.Tensor:
    """What plain transformers and peft make of a run's result."""
    base = run.parent / "model"
    full = (run / "model" / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(
        run / "model" if full and trained else base, dtype=torch.float32
    )
    if trained and not full:
        model = PeftModel.from_pretrained(model, run / "model")
    return model.eval()(torch.arange(3, 40)[None]).logits


def held_out(run: Path) -> dict[str, float]:
    return json.loads((run / "run.json").read_text())["result"]["after"]


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
