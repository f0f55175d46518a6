"""The training panel: what it computes and how it fits."""

from __future__ import annotations

import io
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from medicalgpt_cli.terminal.progress import (
    TrainingState,
    data_lines,
    duration,
    panel,
    quantity,
    size,
    sparkline,
)


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([8, 0], 10, "█▁"),
        ([1, 1, 1], 5, "▄▄▄"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([1, float("nan"), 2], 5, "▁█"),
        ([], 5, ""),
    ],
)
def test_sparkline(values, width: int, line: str) -> None:
    assert sparkline(values, width) == line


def test_figures_for_people() -> None:
    assert [duration(value) for value in (None, 0, 59.6, 3725)] == ["–", "0:00:00", "0:01:00", "1:02:05"]
    assert [size(value) for value in (None, 3 * 2**20, 1.5 * 2**30)] == ["–", "3 MiB", "1.5 GiB"]
    assert [quantity(value) for value in (812, 48_000, 4_884_480, 7.6e9)] == [
        "812",
        "48 k",
        "4.88 M",
        "7.6 B",
    ]


def test_time_left_comes_from_the_last_steps_and_ignores_those_of_an_earlier_process() -> None:
    state = TrainingState({"steps": 120, "from_step": 100})
    assert state.left is None
    for step in range(101, 106):
        time.sleep(0.02)
        state.add_metrics(step, {"loss": 1.0})
    assert 0.2 < state.left < 1.0  # 15 steps of 0.02 s; with the 100 earlier ones it would be 0.02 s


def shown(state: TrainingState, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False).print(panel(state, width))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 132])
def test_the_panel_fits_and_cuts_no_figure(width: int) -> None:
    state = TrainingState({"stage": "sft", "model": "模型-0.5B", "steps": 12_345, "before": {"loss": 3.0}})
    for step in range(1, 200):
        values = {"loss": 1 / step, "epoch": 0.5, "learning_rate": 2e-4, "grad_norm": 0.1234}
        state.add_metrics(step, {**values, "target_tokens_per_second": 98_765.4, "memory": 70 * 2**30})
    state.add_eval(199, {"eval_loss": 1.2345, "eval_perplexity": 3.44})
    state.checkpoint = 150
    lines = shown(state, width)
    assert {cell_len(line) for line in lines} == {min(width, 100)}
    text = "\n".join(lines)
    for figure in (
        "199/12,345",
        "0.0050",
        "1.2345",
        "2.00e-04",
        "98,765",
        "70.0 GiB",
        "step 150",
        "0.123",
        "模型",
    ):
        assert figure in text, figure


def test_the_panel_before_the_first_step() -> None:
    text = "\n".join(shown(TrainingState({"steps": 10}), 80))
    assert "0/10" in text and "–" in text


def test_data_lines_name_every_reason() -> None:
    part = {
        "read": 10,
        "used": 8,
        "skipped": {"empty": 2},
        "merged": {},
        "truncated": {"cut": 1},
        "formats": {"a": "qa"},
    }
    lines = data_lines({"training": part, "held_out": {"read": 3, "used": 3}})
    assert lines == [
        "training data: 10 records read · 8 used (qa)",
        "· 2 skipped: empty",
        "· 1 truncated: cut",
        "held-out data: 3 records read · 3 used",
    ]
