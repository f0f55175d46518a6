"""The proofs on a real model and real medical questions (slow; docs/testing.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.held_out_reference import held_out_loss
from tests.cli import medgpt
from tests.engine.training.trl_reference import our_losses, trl_losses
from tests.engine.training.trl_reward_reference import trl_reward_losses

pytestmark = pytest.mark.slow


def test_loss_curve_equals_trl_over_100_steps(real_model: Path, full_data: Path, tmp_path: Path) -> None:
    lines = (full_data / "sft" / "medquad_en_alpaca.jsonl").read_text().splitlines()[:200]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(lines) + "\n")
    more = ("--batch-size", "2", "--max-length", "256")
    ours = our_losses(real_model, data, tmp_path / "run", steps=100, more=more)
    theirs = trl_losses(real_model, data, tmp_path / "trl", tmp_path / "run", steps=100)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"loss {ours[0]:.4f} → {ours[-1]:.4f}; largest difference to TRL over 100 steps: {worst:.2e}")
    assert len(ours) == len(theirs) == 100
    assert worst <= 2e-3


@pytest.mark.parametrize("pairs", ["exam_pairs_en", "exam_pairs_zh"])
def test_reward_loss_curve_equals_trl_over_30_steps(
    real_model: Path, full_data: Path, tmp_path: Path, pairs: str
) -> None:
    run = tmp_path / "run"
    done = medgpt(
        *("reward", "--base-model", real_model, "--train-data", full_data / "preference" / f"{pairs}.jsonl"),
        *("--eval-fraction", "0", "--max-steps", "30", "--lora-dropout", "0", "--use-cpu", "--dtype", "fp32"),
        *("--output-dir", run),
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    ours = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    theirs = trl_reward_losses(real_model, tmp_path / "trl", run, steps=30, pad_token="<|endoftext|>")
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{pairs}: largest difference to TRL over 30 steps: {worst:.2e}")
    assert len(ours) == len(theirs) == 30
    assert worst <= 2e-3


def test_held_out_figures_equal_plain_transformers(real_model: Path, full_data: Path, tmp_path: Path) -> None:
    dev = tmp_path / "dev.jsonl"
    dev.write_text(
        "\n".join((full_data / "eval" / "medquad_en_dev.jsonl").read_text().splitlines()[:60]) + "\n"
    )
    done = medgpt(
        *("sft", "--base-model", real_model, "--train-data", full_data / "sft" / "medquad_en_alpaca.jsonl"),
        *(
            "--eval-data",
            dev,
            "--max-length",
            "256",
            "--max-steps",
            "30",
            "--batch-size",
            "2",
            "--dtype",
            "fp32",
        ),
        *("--eval-steps", "1000", "--use-cpu", "--output-dir", tmp_path / "run", "--json"),
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    adapter = str(tmp_path / "run" / "model")
    for moment, reference in (
        ("before", held_out_loss(str(real_model), None, str(dev), 256)),
        ("after", held_out_loss(str(real_model), adapter, str(dev), 256)),
    ):
        print(moment, result[moment], reference)
        assert result[moment]["tokens"] == reference["tokens"]
        assert result[moment]["bits_per_byte"] == pytest.approx(reference["bits_per_byte"], abs=1e-3)
        assert result[moment]["loss"] == pytest.approx(reference["loss"], abs=1e-3)
    assert result["after"]["loss"] < result["before"]["loss"]
