"""The figures of a reward model, by hand."""

from __future__ import annotations

import math

import pytest

from medicalgpt_cli.engine.evaluation.preferences import judge
from medicalgpt_cli.engine.evaluation.statistics import wilson_interval
from medicalgpt_cli.engine.run.summary import length_rows, part_table

CHOSEN = [2.0, 0.0, 1.0, 1.0, -1.0]
REJECTED = [1.0, 1.0, 1.0, -1.0, -1.5]
MARGINS = [0.0, 0.0, 0.0, 1.0, 0.0]
LONGER = [True, True, None, False, False]
SOURCES = ["a", "a", "a", "a", "b"]


@pytest.fixture(scope="module")
def figures():
    return judge(CHOSEN, REJECTED, MARGINS, LONGER, SOURCES)


def nats(difference: float) -> float:
    return math.log(1 + math.exp(-difference))


def test_loss_of_all_pairs_with_their_margins(figures) -> None:
    losses = [nats(1), nats(-1), nats(0), nats(2 - 1), nats(0.5)]
    assert figures["pairs"] == 5
    assert figures["loss"] == pytest.approx(sum(losses) / 5)
    assert [part["source"] for part in figures["parts"]] == ["a", "b"]
    assert figures["parts"][0]["loss"] == pytest.approx(sum(losses[:4]) / 4)


def test_accuracy_with_a_tie_as_one_half_and_its_interval(figures) -> None:
    part = figures["parts"][0]
    share, n, z = 2.5 / 4, 4, 1.959963984540054
    assert part["pairs"] == 4 and part["accuracy"] == share
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert (part["low"], part["high"]) == pytest.approx((centre - half, centre + half))
    assert figures["parts"][1]["accuracy"] == 1.0 and figures["parts"][1]["high"] == 1.0


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    """Nine pairs of three prompts: the interval is that of the three, and 100 % right has no spread."""
    right = [1.0] * 5 + [-1.0] * 4
    prompts = ["p", "p", "p", "q", "q", "q", "r", "r", "r"]
    arguments = (right, [0.0] * 9, [0.0] * 9, [None] * 9, ["a"] * 9)
    part = judge(*arguments, prompts)["parts"][0]
    assert part["accuracy"] == 5 / 9
    # Three prompts with 3, 2 and 0 right of 3: the lowest and the highest of 27 resamples are 0 and 1, 1 in 27 each.
    assert (part["low"], part["high"]) == (0.0, 1.0)
    alone = judge(*arguments)["parts"][0]
    assert (alone["low"], alone["high"]) == pytest.approx(wilson_interval(5, 9))
    sure = judge([1.0] * 9, *arguments[1:], prompts)["parts"][0]
    assert sure["accuracy"] == 1.0 and sure["low"] is None and sure["high"] is None
    assert "no spread" in part_table({}, {"parts": [sure]})[1][0]


def test_margin_and_what_taking_the_longer_answer_gives(figures) -> None:
    part = figures["parts"][0]
    assert part["margin"] == pytest.approx((1 - 1 + 0 + 2) / 4)  # of the scores, without the margin asked for
    assert part["longer_wins"] == (1 + 1 + 0.5 + 0) / 4
    assert figures["parts"][1]["longer_wins"] == 0


def test_accuracy_by_which_answer_is_longer(figures) -> None:
    assert figures["parts"][0]["by_length"] == {
        "chosen longer": {"pairs": 2, "accuracy": 0.5},
        "same length": {"pairs": 1, "accuracy": 0.5},
        "chosen shorter": {"pairs": 1, "accuracy": 1.0},
    }
    assert list(figures["parts"][1]["by_length"]) == ["chosen shorter"]  # no empty rows
    assert len(length_rows(figures)) == 4


def test_calibration_by_hand() -> None:
    """Ten pairs of 80 %, nine of which are right: 0.1 away, both ways round."""
    even = math.log(0.8 / 0.2)
    found = judge([even] * 9 + [0.0], [0.0] * 9 + [even], [0.0] * 10, [None] * 10, ["a"] * 10)
    assert found["parts"][0]["calibration_error"] == pytest.approx(0.1)
    # Pairs of which nothing is known are right half of the time.
    blind = judge([0.0] * 4, [0.0] * 4, [0.0] * 4, [None] * 4, ["a"] * 4)
    assert blind["parts"][0]["calibration_error"] == pytest.approx(0.0)
    assert blind["loss"] == pytest.approx(math.log(2))


def test_far_scores_give_numbers() -> None:
    found = judge([1e4, -1e4], [-1e4, 1e4], [0.0, 0.0], [True, False], ["a", "a"])
    assert found["loss"] == pytest.approx(1e4)
    assert found["parts"][0]["accuracy"] == 0.5


def test_the_table_has_a_before_only_where_there_is_one(figures) -> None:
    head, rows = part_table({}, figures)
    assert head[:4] == ["held-out pairs", "pairs", "accuracy", "95 %"]
    assert rows[0][:3] == ["a", "4", "62.5 %"] and len(rows[0]) == len(head)
    before = judge([0.0] * 5, [1.0] * 5, MARGINS, LONGER, SOURCES)
    head, rows = part_table(before, figures)
    assert head[2:4] == ["accuracy before", "after"]
    assert rows[0][2:4] == ["0.0 %", "62.5 %"] and len(rows[0]) == len(head)
