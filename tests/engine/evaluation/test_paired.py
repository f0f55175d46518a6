"""Before and after on the same items: worked by hand, by another program's formula, and through the stages."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from medicalgpt_cli.engine.data.examples import IGNORED, Example
from medicalgpt_cli.engine.data.packing import Block, HeldOut, Window
from medicalgpt_cli.engine.evaluation.paired import paired_differences, per_answer, per_text
from medicalgpt_cli.engine.evaluation.statistics import mean_interval, wilson_interval
from medicalgpt_cli.engine.pipeline.figures import figures
from medicalgpt_cli.engine.rewards.sources import WeightedReward
from medicalgpt_cli.engine.run.report import page
from medicalgpt_cli.engine.training.batches import padded, stacked
from medicalgpt_cli.terminal.progress import end_lines
from tests.held_out import held_out, text_loss
from tests.tiny import tiny_model


def test_a_difference_by_hand() -> None:
    """Loss is a ratio: nats over tokens. Two questions, the first with two answers."""
    before = per_text(["a", "a", "b"], [(9.0, 8.0), (3.0, 2.0), (4.0, 4.0)], [3, 2, 5], [4, 4, 8])
    after = per_text(["a", "a", "b"], [(6.0, 5.0), (3.0, 2.0), (2.0, 2.0)], [3, 2, 5], [4, 4, 8])
    found = paired_differences(before.as_dict(), after.as_dict())
    assert found["loss"]["difference"] == pytest.approx((11 - 16) / 10)
    assert found["bits_per_byte"]["difference"] == pytest.approx((9 - 14) / 16 / math.log(2))
    # The resamples are (a, a), (a, b), (b, a), (b, b): -3/5, -1/2, -1/2, -2/5.
    assert (found["loss"]["low"], found["loss"]["high"]) == pytest.approx((-3 / 5, -2 / 5))
    assert set(found) == {"loss", "bits_per_byte"}


def test_pairs_see_what_two_intervals_that_overlap_hide() -> None:
    """Hard prompts stay hard: intervals of before and after overlap almost wholly, the difference is beyond doubt."""
    generator = np.random.default_rng(0)
    hard = generator.normal(scale=3.0, size=64)
    before = list(hard + generator.normal(scale=0.1, size=64))
    after = list(hard + 0.2 + generator.normal(scale=0.1, size=64))
    (low, _), (_, high) = mean_interval(after), mean_interval(before)
    assert low < np.mean(before) and high > np.mean(after)
    names = list(range(64))
    found = paired_differences(
        per_answer(names, {"reward": before}).as_dict(), per_answer(names, {"reward": after}).as_dict()
    )["reward"]
    change = np.asarray(after) - before
    half = 1.96 * change.std() / 8  # the normal interval of a paired difference
    assert (found["low"], found["high"]) == pytest.approx(
        (change.mean() - half, change.mean() + half), abs=0.01
    )
    assert found["low"] > 0.1


def test_nothing_is_compared_that_is_not_the_same() -> None:
    one = per_answer(["a", "b"], {"reward": [0.0, 1.0]}).as_dict()
    assert paired_differences(one, per_answer(["a", "c"], {"reward": [0.0, 1.0]}).as_dict()) == {}
    assert paired_differences({}, one) == paired_differences(one, {}) == paired_differences(None, one) == {}
    same = paired_differences(one, one)["reward"]
    assert same == {"difference": 0.0, "low": None, "high": None}  # no item has moved: no spread


def test_parts_stay_apart() -> None:
    parts = [{"source": "x"}, {"source": "x"}, {"source": "y"}, {"source": "y"}]
    kept = {"parts": parts, "by_part": ["accuracy"]}
    before = per_answer("abcd", {"accuracy": [0.0, 1.0, 0.0, 0.0], "loss": [1.0, 1.0, 2.0, 2.0]}, **kept)
    after = per_answer("abcd", {"accuracy": [1.0, 1.0, 0.0, 1.0], "loss": [0.5, 1.0, 2.0, 1.0]}, **kept)
    found = paired_differences(before.as_dict(), after.as_dict())
    assert "accuracy" not in found and found["loss"]["difference"] == pytest.approx(-1.5 / 4)
    assert [part["source"] for part in found["parts"]] == ["x", "y"]
    assert [part["accuracy"]["difference"] for part in found["parts"]] == [0.5, 0.5]


# ---- end tokens


def test_bits_per_byte_count_an_end_token_in_neither_stage(tmp_path: Path) -> None:
    """The same text as a held-out answer of sft and as a held-out document of pretrain: the same bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place).eval()
    texts = ["Check with your doctor.", "建议多饮水。", "Rest."]
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    answers = [
        Example([start, *one, tokenizer.eos_token_id], [IGNORED, *one, tokenizer.eos_token_id], at="x:1")
        for one in ids
    ]
    windows = [
        Window(Block([start, *one[:-1]], one, [0]), ("x", "en"), n, len(text.encode()))
        for n, (one, text) in enumerate(zip(ids, texts, strict=True))
    ]
    size = sum(len(text.encode()) for text in texts)
    of_sft = held_out(model, answers, tokenizer, lambda some: padded(some, 0), batch_size=2)
    of_pretrain = text_loss(
        model, HeldOut(windows, {("x", "en"): size}), lambda some: stacked(some, 0), batch_size=2
    )
    nats = 0.0
    for one in ids:
        with torch.no_grad():
            logits = model.double()(torch.tensor([[start, *one]])).logits[0].log_softmax(-1)
        nats -= sum(float(logits[place, token]) for place, token in enumerate(one))
    model.float()
    assert of_sft["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert of_pretrain["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert of_sft["tokens"] == of_pretrain["tokens"] + len(texts)  # the loss is of the end tokens, too


# ---- rewards


def reward_of(values: list[float]):
    return lambda prompts, answers, tokens: values


def test_a_binary_rule_has_wilsons_interval() -> None:
    right = [1.0] * 7 + [0.0] * 3
    low, high = wilson_interval(7, 10)
    for weight, ends in ((1.0, (low, high)), (0.5, (low / 2, high / 2)), (-2.0, (-2 * high, -2 * low))):
        reward = WeightedReward({"right-option": (weight, reward_of(right))})
        found = reward.intervals(reward([None] * 10, [""] * 10, [[]] * 10))
        assert (found["reward_low"], found["reward_high"]) == pytest.approx(ends)
    nothing = WeightedReward({"answer-format": (1.0, reward_of([0.0] * 10))})
    found = nothing.intervals(nothing([None] * 10, [""] * 10, [[]] * 10))
    assert found["reward_low"] == 0.0 and found["reward_high"] == pytest.approx(wilson_interval(0, 10)[1])


def test_a_sum_has_the_bootstraps_and_each_part_its_own() -> None:
    right, scores = [1.0] * 7 + [0.0] * 3, [float(n) for n in range(10)]
    reward = WeightedReward(
        {"right-option": (2.0, reward_of(right)), "reward model": (1.0, reward_of(scores))}
    )
    total = reward([None] * 10, [""] * 10, [[]] * 10)
    found = reward.intervals(total)
    assert (found["reward_low"], found["reward_high"]) == mean_interval(total)
    assert (found["reward_right-option_low"], found["reward_right-option_high"]) == wilson_interval(7, 10)
    assert (found["reward_reward_model_low"], found["reward_reward_model_high"]) == mean_interval(scores)
    flat = WeightedReward({"length": (1.0, reward_of([0.25] * 10))})
    assert flat.intervals(flat([None] * 10, [""] * 10, [[]] * 10)) == {
        "reward_low": None,
        "reward_high": None,
    }


# ---- where people see it


RESULT = {
    "steps": 3,
    "before": {"loss": 2.0, "reward": 0.5},
    "after": {"loss": 1.5, "reward": 0.5, "reward_low": None, "reward_high": None},
    "change": {
        "loss": {"difference": -0.5, "low": -0.75, "high": -0.25},
        "reward": {"difference": 0.0, "low": None, "high": None},
    },
}


def test_the_difference_stands_wherever_before_and_after_do() -> None:
    lines = end_lines(RESULT)
    assert any("held-out loss" in one and "difference, 95 %: −0.7500 to −0.2500" in one for one in lines)
    assert any("held-out reward" in one and one.count("no spread") == 2 for one in lines)
    table = {one.name: asdict(one) for one in figures("sft", {"result": RESULT})}
    assert table["held-out loss"]["difference"] == "−0.7500 to −0.2500"
    assert table["held-out reward"]["interval"] == table["held-out reward"]["difference"] == "no spread"
    report = page({"stage": "sft", "model": "m", "settings": {}, "result": RESULT}, [], "run")
    assert "difference, 95 %: −0.7500 to −0.2500" in report and "no spread" in report


def test_each_source_has_its_own_difference() -> None:
    one = {
        "source": "a/dev.jsonl",
        "pairs": 40,
        "longer_wins": 0.7,
        "accuracy": 0.975,
        "low": 0.871,
        "high": 0.996,
    }
    change = {
        "parts": [{"source": "a/dev.jsonl", "accuracy": {"difference": 0.6, "low": 0.475, "high": 0.775}}]
    }
    before = {"parts": [{**one, "accuracy": 0.35}]}
    (found,) = figures("reward", {"result": {"before": before, "after": {"parts": [one]}, "change": change}})
    assert (found.interval, found.difference) == ("87.1–99.6 %", "+47.5 to +77.5 pp")
    sure = {**one, "accuracy": 1.0, "low": None, "high": None}
    (found,) = figures("reward", {"result": {"before": before, "after": {"parts": [sure]}}})
    assert (found.interval, found.difference) == ("no spread", "")


def test_a_brute_force_over_all_resamples_of_a_run_result() -> None:
    """What stands in run.json is what anybody finds who draws the four prompts in all 256 ways."""
    before, after = [0.0, 0.5, 1.0, 0.25], [1.0, 0.5, 1.5, 2.25]
    found = paired_differences(
        json.loads(json.dumps(per_answer("abcd", {"reward": before}).as_dict())),
        json.loads(json.dumps(per_answer("abcd", {"reward": after}).as_dict())),
    )["reward"]
    change = [one - other for one, other in zip(after, before, strict=True)]
    means = [sum(drawn) / 4 for drawn in itertools.product(change, repeat=4)]
    assert found["difference"] == sum(change) / 4
    assert found["low"] == pytest.approx(np.quantile(means, 0.025), abs=0.13)
    assert found["high"] == pytest.approx(np.quantile(means, 0.975), abs=0.13)
