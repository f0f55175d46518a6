"""Each stage on a GPU beside the same stage on the processor, both in 32 bits; skipped without a GPU.

pytest -m slow tests/engine/training/test_on_a_gpu.py tests/engine/training/test_speed.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli import medgpt
from tests.tiny import tiny_model, write_jsonl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
WORDS = ["fever", "cough", "头痛", "diet", "rest"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    tiny_model(folder / "model", seed=4)
    rows = [
        {"question": f"What about {word} {n}?", "answer": "Rest. " * (1 + n)}
        for n in range(5)
        for word in WORDS
    ]
    write_jsonl(folder / "talk.jsonl", rows)
    write_jsonl(folder / "text.jsonl", [{"text": row["question"] * 9} for row in rows])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["question"]} for row in rows])
    pairs = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": f"no {n}"}
        for n, row in enumerate(rows)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def trained(place: Path, stage: str, data: str, run: str, *flags: object) -> tuple[list[float], dict]:
    """The losses of a run's updates and its result."""
    done = medgpt(
        *(stage, "--base-model", "model", "--train-data", data, "--eval-fraction", "0.2"),
        *("--max-steps", "4", "--output-dir", run, *flags),
        cwd=place,
        timeout=600,
        fresh=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (place / run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((place / run / "run.json").read_text())["result"]
    return [line["loss"] for line in lines if "loss" in line], result


STAGES = [
    ("pretrain", "text.jsonl", ("--block-size", "32", "--lora-dropout", "0")),
    ("sft", "talk.jsonl", ("--lora-dropout", "0")),
    ("sft", "talk.jsonl", ("--tuning", "full", "--layout", "padded")),
    ("reward", "pairs.jsonl", ("--lora-dropout", "0")),
]


@pytest.mark.parametrize(("stage", "data", "flags"), STAGES)
def test_the_losses_are_those_of_the_processor(place: Path, stage: str, data: str, flags: tuple[str, ...]):
    run = f"{stage}-{len(flags)}"
    options = (*flags, "--dtype", "fp32", "--learning-rate", "0.003")
    ours, _ = trained(place, stage, data, f"{run}-gpu", *options)
    theirs, _ = trained(place, stage, data, f"{run}-cpu", *options, "--use-cpu")
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_rl_learns_and_every_figure_is_a_number(place: Path, algorithm: str):
    """Draws differ between devices, so figures are not compared; log-probabilities of the same answers are, by the KL:
    a policy that has not moved is at 0 from its reference on either."""
    flags = ("--algorithm", algorithm, "--reward-rule", "length", "--max-new-tokens", "16", "--dtype", "fp32")
    _, result = trained(place, "rl", "prompts.jsonl", f"rl-{algorithm}", *flags)
    before, after = result["before"], result["after"]
    assert result["steps"] == 4 and before["kl"] == pytest.approx(0, abs=1e-5)
    assert all(value == value for value in (*before.values(), *after.values()) if isinstance(value, float))
    assert after["kl"] != before["kl"]


@pytest.mark.parametrize("bits", ["--load-in-8bit", "--load-in-4bit"])
def test_few_bits_train(place: Path, bits: str):
    losses, _ = trained(place, "sft", "talk.jsonl", f"sft{bits}", bits, "--learning-rate", "0.003")
    assert len(losses) == 4 and all(loss == loss for loss in losses)


def test_greedy_answers_are_those_of_the_processor(place: Path):
    (place / "in.txt").write_text("\n".join(f"What about {word}?" for word in WORDS), encoding="utf-8")
    texts = []
    for out, flags in (("gpu.json", ()), ("cpu.json", ("--use-cpu",))):
        done = medgpt(
            *("infer", "--base-model", "model", "--data-file", "in.txt", "--predictions-file", out),
            *("--dtype", "fp32", "--max-new-tokens", "24", *flags),
            cwd=place,
            fresh=True,
        )
        assert done.returncode == 0, done.stderr
        texts.append((place / out).read_text(encoding="utf-8"))
    assert json.loads(texts[0]) == json.loads(texts[1])
