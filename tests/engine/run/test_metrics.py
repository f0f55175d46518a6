"""metrics.jsonl: one line a step, also across kills and resumes."""

from __future__ import annotations

import json
from pathlib import Path

from medicalgpt_cli.engine.run import metrics


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics.append(file, {"step": 1, "loss": 2.5})
    metrics.append(file, {"step": 2, "eval_loss": 2.25})
    assert metrics.read(file) == [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 2.25}]
    assert metrics.read(tmp_path / "missing") == []


def test_not_a_number_becomes_null_and_the_file_stays_json(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics.append(file, {"step": 1, "loss": float("nan"), "grad_norm": float("inf")})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(file.read_text(), parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None}
    assert metrics.series(metrics.read(file), "loss") == []


def test_a_torn_last_line_is_left_out_and_the_next_one_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics.append(file, {"step": 1, "loss": 1.0})
    with file.open("a") as torn:
        torn.write('{"step": 2, "lo')
    assert metrics.read(file) == [{"step": 1, "loss": 1.0}]
    metrics.drop_after(file, 1)
    metrics.append(file, {"step": 2, "loss": 0.5})
    assert metrics.series(metrics.read(file), "loss") == [(1, 1.0), (2, 0.5)]


def test_drop_after_forgets_the_steps_that_are_done_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        metrics.append(file, {"step": step, "loss": float(step)})
    metrics.drop_after(file, 3)
    assert [record["step"] for record in metrics.read(file)] == [1, 2, 3]


def test_damaged_lines_in_front_of_the_last_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo\n[3]\n{"step": 4}\n{"step": 5, "l')
    assert metrics.drop_after(file, 9) == 2
    assert metrics.drop_after(file, 9) == 0
