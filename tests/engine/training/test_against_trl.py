"""The proof that the data path and the loss are right: TRL's own trainer on the same tokens, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.training.trl_reference import our_losses, trl_losses
from tests.tiny import tiny_model, write_jsonl


@pytest.mark.parametrize("layout", ["padding-free", "padded"])
def test_loss_curves_agree(layout: str, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    rows = [
        {"question": f"What is {n}?" + " Why?" * (n % 7), "answer": "The answer is " + "yes. " * (n % 5 + 1)}
        for n in range(64)  # whole updates in each epoch
    ]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    run = tmp_path / "run"
    ours = our_losses(
        tmp_path / "model",
        data,
        run,
        steps=20,
        accumulation=2,
        more=("--layout", layout, "--learning-rate", "0.01"),
    )
    theirs = trl_losses(tmp_path / "model", data, tmp_path / "trl", run, steps=20, accumulation=2)
    assert len(ours) == len(theirs) == 20
    assert ours[-1] < ours[0] - 0.5  # something was learnt, so the comparison says something
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 2e-3
