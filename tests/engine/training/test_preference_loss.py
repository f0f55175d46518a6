"""The Bradley-Terry loss: by hand, against loops, far out, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medicalgpt_cli.engine.training.preference_loss import bradley_terry_loss

NUMBERS = st.integers(-8000, 8000).map(lambda x: x / 1000)


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand():
    # Differences of 0 and ln 3: probabilities of 1/2 and 3/4.
    chosen, rejected = tensor([2.0, math.log(3)]), tensor([2.0, 0.0])
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    # Margins of ln 3 make them 1/4 and 1/2.
    margin = tensor([math.log(3), math.log(3)])
    assert bradley_terry_loss(chosen, rejected, margin).item() == pytest.approx(
        (math.log(4) + math.log(2)) / 2
    )
    # Sums of 4 and ln 3.
    centred = bradley_terry_loss(chosen, rejected, centring=0.01).item()
    assert centred == pytest.approx((math.log(2) + math.log(4 / 3)) / 2 + 0.01 * (16 + math.log(3) ** 2) / 2)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS.map(abs)), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 1.0]),
)
def test_equals_the_loop(pairs, with_margin, centring):
    chosen, rejected, margin = (tensor(list(side)) for side in zip(*pairs, strict=True))
    expected = 0.0
    for c, r, gap in pairs:
        wins = 1 / (1 + math.exp(-(c - r - (gap if with_margin else 0.0))))
        expected += (-math.log(wins) + centring * (c + r) ** 2) / len(pairs)
    actual = bradley_terry_loss(chosen, rejected, margin if with_margin else None, centring)
    assert actual.item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_scores_neither_overflow_nor_vanish(dtype):
    far, near = torch.tensor([1000.0], dtype=dtype), torch.tensor([-1000.0], dtype=dtype)
    assert bradley_terry_loss(far, near).item() == 0.0
    wrong = near.clone().requires_grad_()
    loss = bradley_terry_loss(wrong, far)
    assert loss.dtype == torch.float32
    assert loss.item() == 2000.0
    loss.backward()
    assert wrong.grad.item() == -1.0


def test_bfloat16_scores_are_subtracted_in_float32():
    chosen, rejected = torch.tensor([100.0]).bfloat16(), torch.tensor([0.125]).bfloat16()
    margin = torch.tensor([99.875])
    assert bradley_terry_loss(chosen, rejected, margin).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("centring", [0.0, 0.1])
def test_gradient_equals_central_differences(centring):
    g = torch.Generator().manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 5, dtype=torch.float64, generator=g)
    step = 1e-6
    for at, moves in ((0, chosen), (1, rejected)):
        sides = [chosen, rejected]
        sides[at] = moves.clone().requires_grad_()
        bradley_terry_loss(*sides, margin, centring).backward()
        for i in range(5):
            moved = torch.zeros(5, dtype=torch.float64)
            moved[i] = step
            ends = []
            for sign in (1, -1):
                shifted = [chosen, rejected]
                shifted[at] = moves + sign * moved
                ends.append(bradley_terry_loss(*shifted, margin, centring).item())
            assert sides[at].grad[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8)
