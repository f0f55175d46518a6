"""Statistics of evaluations: values worked by hand, brute force, and the edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medicalgpt_cli.engine.evaluation.statistics import (
    distinct_n,
    expected_calibration_error,
    mean_interval,
    pearson,
    ratio_interval,
    reliability_bins,
    share_interval,
    wilson_interval,
)

# ---- Wilson's interval


def test_wilson_interval_by_hand():
    # z = 1.959964, z^2 = 3.841459. 8 of 10: (0.8 + 0.192073 -+ 1.959964 sqrt(0.016 + 0.0096036)) / 1.3841459
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    # Without successes: 0 to z^2 / (n + z^2).
    assert wilson_interval(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((10 / 13.841459, 1.0), abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson_interval(3, 2)


@pytest.mark.parametrize(("confidence", "z"), [(0.90, 1.6448536), (0.95, 1.9599640), (0.99, 2.5758293)])
@given(total=st.integers(1, 3000), share=st.floats(0, 1))
def test_wilson_ends_are_the_proportions_that_the_score_test_just_accepts(total, share, confidence, z):
    """By its definition: p belongs to the interval while |share - p| <= z sqrt(p (1 - p) / n)."""
    successes = round(share * total)
    low, high = wilson_interval(successes, total, confidence)
    assert 0 <= low <= successes / total <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            distance = abs(successes / total - p)
            assert distance == pytest.approx(z * math.sqrt(p * (1 - p) / total), rel=1e-6)
    assert wilson_interval(total - successes, total, confidence) == pytest.approx((1 - high, 1 - low))


# ---- the bootstrap


def test_mean_interval_is_that_of_every_possible_resample():
    """Of four values there are 256 resamples; their quantiles are known without drawing."""
    values = [0.0, 1.0, 4.0, 11.0]
    means = sorted(sum(drawn) / 4 for drawn in itertools.product(values, repeat=4))
    low, high = mean_interval(values, 0.8, seed=1, resamples=20000)
    assert low == pytest.approx(np.quantile(means, 0.1), abs=0.26)  # the next mean is 0.25 away
    assert high == pytest.approx(np.quantile(means, 0.9), abs=0.26)
    assert high - low > 4


def test_mean_interval_repeats_itself_and_depends_on_seed_and_confidence():
    values = list(np.random.default_rng(0).normal(size=40))
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)
    wide, narrow = mean_interval(values, 0.99), mean_interval(values, 0.5)
    assert wide[0] < narrow[0] < sum(values) / 40 < narrow[1] < wide[1]
    # Near the normal interval, which the central limit theorem promises.
    half = 1.96 * np.std(values) / math.sqrt(40)
    assert mean_interval(values) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.03)


def test_mean_interval_of_one_value_and_of_none():
    assert mean_interval([2.5]) is None
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


@pytest.mark.parametrize("values", [[0.0] * 64, [1.0] * 64, [0.1 + 0.2] * 3, [-1e9] * 2])
def test_values_that_are_all_the_same_have_no_spread(values):
    """An interval of width 0 would say that nothing else can come; nobody knows that."""
    assert mean_interval(values) is None
    assert mean_interval([*values, values[0] + 1]) is not None


def test_ratio_interval_is_that_of_every_possible_resample_of_groups():
    """Four groups of one to three items with unequal bottoms: 256 resamples, whose quantiles are known."""
    tops, bottoms = [1.0, 2.0, 0.5, 7.0, 1.0, 3.0, 0.0], [2.0, 1.0, 1.0, 2.0, 5.0, 1.0, 3.0]
    groups = ["a", "b", "a", "c", "d", "b", "a"]
    sums = [(1.5, 6.0), (5.0, 2.0), (7.0, 2.0), (1.0, 5.0)]
    ratios = sorted(
        sum(top for top, _ in drawn) / sum(bottom for _, bottom in drawn)
        for drawn in itertools.product(sums, repeat=4)
    )
    low, high = ratio_interval(tops, bottoms, groups, 0.8, seed=1, resamples=20000)
    for found, level in ((low, 0.1), (high, 0.9)):
        near = sorted(ratios, key=lambda ratio: abs(ratio - np.quantile(ratios, level)))[:12]
        assert min(near) <= found <= max(near)


def test_repeating_items_within_their_groups_says_nothing_new():
    """Ten copies of each pair of a prompt are no more evidence than one; taken for independent they would seem so."""
    values = list(np.random.default_rng(2).normal(size=12))
    copies, groups = [one for one in values for _ in range(10)], [n for n in range(12) for _ in range(10)]
    assert mean_interval(copies, groups=groups) == pytest.approx(mean_interval(values))
    alone = mean_interval(copies)
    together = mean_interval(copies, groups=groups)
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    assert mean_interval(copies, groups=["one"] * 120) is None


def test_the_interval_of_grouped_items_covers_what_it_should():
    """Of 200 draws of 40 prompts with 1 to 6 answers that share a prompt's luck, some 95 % hold the true mean."""
    generator = np.random.default_rng(0)
    covered = {"groups": 0, "alone": 0}
    for draw in range(200):
        groups = [n for n in range(40) for _ in range(generator.integers(1, 7))]
        luck = generator.normal(size=40)
        values = [luck[n] + 0.3 * generator.normal() for n in groups]
        for name, known in (("groups", groups), ("alone", None)):
            low, high = mean_interval(values, groups=known, resamples=200, seed=draw)
            covered[name] += low <= 0 <= high
    assert 176 <= covered["groups"] <= 198 and covered["alone"] < 160


def test_shares_have_wilsons_interval_and_by_groups_the_bootstrap():
    assert share_interval([1, 0, 0.5, 1]) == wilson_interval(2.5, 4)
    assert share_interval([1, 0, 0.5, 1], list("abcd")) == wilson_interval(2.5, 4)
    assert share_interval([1, 1, 1], list("aab")) is None  # no spread
    values, groups = [1, 1, 0, 1, 0], list("aabbc")
    assert share_interval(values, groups) == mean_interval(values, groups=groups)


# ---- calibration


def test_reliability_bins_by_hand():
    probabilities, outcomes = [0.1, 0.2, 0.5, 0.9, 1.0, 0.7], [0, 1, True, True, True, False]
    assert reliability_bins(probabilities, outcomes, bins=2) == [
        {"from": 0.0, "to": 0.5, "count": 2, "mean_probability": pytest.approx(0.15), "share_right": 0.5},
        {"from": 0.5, "to": 1.0, "count": 4, "mean_probability": pytest.approx(0.775), "share_right": 0.75},
    ]
    # 2/6 * |0.5 - 0.15| + 4/6 * |0.75 - 0.775|
    assert expected_calibration_error(probabilities, outcomes, bins=2) == pytest.approx(0.8 / 6)


def test_calibration_error_of_the_sure():
    assert expected_calibration_error([1.0, 1.0, 0.0], [True, True, False]) == 0.0
    assert expected_calibration_error([1.0, 0.0], [False, True]) == 1.0
    empty = reliability_bins([1.0], [True])[0]
    assert empty == {"from": 0.0, "to": 0.1, "count": 0, "mean_probability": None, "share_right": None}


@given(
    st.lists(st.tuples(st.integers(0, 100).map(lambda x: x / 100), st.booleans()), min_size=1, max_size=40),
    st.sampled_from([1, 3, 10, 100]),
)
def test_calibration_equals_the_loop(answers, bins):
    probabilities, outcomes = zip(*answers, strict=True)
    expected, counted = 0.0, 0
    for index, part in enumerate(reliability_bins(probabilities, outcomes, bins)):
        low, high = index / bins, (index + 1) / bins
        inside = [(p, o) for p, o in answers if low <= p < high or (p == 1.0 and index == bins - 1)]
        assert (part["from"], part["to"], part["count"]) == (low, high, len(inside))
        counted += len(inside)
        if inside:
            share = sum(outcome for _, outcome in inside) / len(inside)
            mean = sum(probability for probability, _ in inside) / len(inside)
            assert (part["share_right"], part["mean_probability"]) == pytest.approx((share, mean))
            expected += len(inside) / len(answers) * abs(share - mean)
    assert counted == len(answers)
    assert expected_calibration_error(probabilities, outcomes, bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_refuses_what_is_no_probability():
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="outside"):
            expected_calibration_error([0.5, wrong], [True, True])
    with pytest.raises(ValueError, match="2 probabilities and 1"):
        reliability_bins([0.5, 0.5], [True])
    with pytest.raises(ValueError, match="no probabilities"):
        expected_calibration_error([], [])


# ---- correlation


def test_pearson_by_hand():
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert pearson([1, 2, 3], [6, 4, 2]) == pytest.approx(-1.0)
    # Deviations -1 0 1 and -4/3 -1/3 5/3: 3 / sqrt(2 * 42/9)
    assert pearson([1, 2, 3], [1, 2, 4]) == pytest.approx(3 / math.sqrt(2 * 42 / 9))
    assert pearson([1, 2, 1, 2], [1, 1, 2, 2]) == pytest.approx(0.0)


def test_pearson_is_none_where_it_is_undefined():
    assert pearson([0.1, 0.1, 0.1], [1, 2, 3]) is None
    assert pearson([1, 2, 3], [0.1, 0.1, 0.1]) is None
    assert pearson([1], [2]) is None
    assert pearson([], []) is None
    assert pearson([1, math.nan, 3], [1, 2, 3]) is None
    assert pearson([1, 2, 3], [1, math.inf, 3]) is None
    with pytest.raises(ValueError, match="2 values beside 1"):
        pearson([1, 2], [1])


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=20))
def test_pearson_equals_the_sums_in_whole_numbers(pairs):
    """n sum(xy) - sum(x) sum(y) over the roots of the like: exact for integers."""
    x, y = zip(*pairs, strict=True)
    n = len(pairs)
    across = n * sum(a * b for a, b in pairs) - sum(x) * sum(y)
    spread = (n * sum(a * a for a in x) - sum(x) ** 2) * (n * sum(b * b for b in y) - sum(y) ** 2)
    if spread == 0:
        assert pearson(x, y) is None
        return
    expected = across / math.sqrt(spread)
    assert pearson(x, y) == pytest.approx(expected, abs=1e-12)
    assert pearson([a * 1e-200 for a in x], [b * 1e200 for b in y]) == pytest.approx(expected, abs=1e-9)
    assert pearson([a + 1e9 for a in x], y) == pytest.approx(expected, abs=1e-9)


# ---- variety


def test_distinct_n_by_hand():
    texts = [[1, 2, 1, 2], [2, 1], [3]]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 2 / 4  # 12 21 12, 21; none across texts
    assert distinct_n(texts, 4) == 1.0
    assert distinct_n(texts, 5) is None
    assert distinct_n([], 1) is None


@given(st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=5), st.integers(1, 4))
def test_distinct_n_equals_counting_by_strings(texts, n):
    windows = ["".join(map(str, text))[at:][:n] for text in texts for at in range(len(text))]
    windows = [window for window in windows if len(window) == n]
    seen: list[str] = []
    for window in windows:
        if window not in seen:
            seen.append(window)
    assert distinct_n(texts, n) == (len(seen) / len(windows) if windows else None)
