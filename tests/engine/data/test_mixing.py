"""Weights of sources and shares of `--max-samples`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medicalgpt_cli.engine.data.mixing import Source, parse_source, share_out, shares_of
from medicalgpt_cli.engine.data.packing import MixingSampler, mix
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.batches import EpochSampler
from medicalgpt_cli.engine.training.reward_data import load_reward_data
from medicalgpt_cli.engine.training.rl_data import load_rl_data
from medicalgpt_cli.engine.training.sft_data import load_sft_data
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import RewardSettings, RlSettings, SftSettings
from tests.tiny import tiny_tokenizer, write_jsonl


@given(
    st.integers(0, 300),
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([0.1, 1.0, 3.0])), min_size=1, max_size=6),
)
def test_shares_add_up_and_none_is_above_its_size(total, files):
    sizes, weights = [size for size, _ in files], [weight for _, weight in files]
    found = share_out(total, sizes, weights)
    assert sum(found) == min(total, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(found, sizes, strict=True))


def test_shares_by_hand():
    assert share_out(50, [60, 60], [1, 1]) == [25, 25]
    assert share_out(50, [10, 60], [1, 1]) == [10, 40]
    assert share_out(40, [60, 60], [3, 1]) == [30, 10]
    assert share_out(1, [5, 5, 5], [1, 2, 1]) == [0, 1, 0]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two files of 40 and 20 records, which all stages can read; questions name their file."""
    monkeypatch.chdir(tmp_path)
    for name, number in (("a", 40), ("b", 20)):
        rows = [
            {"question": f"{name} {n}?", "response_chosen": f"yes {n}", "response_rejected": "no"}
            for n in range(number)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def load(stage: str, *train: str, **options):
    common = {"train_data": train, "eval_fraction": 0.0, **options}
    tokenizer = tiny_tokenizer("chatml")
    if stage == "sft":
        return load_sft_data(SftSettings(**common), tokenizer, Observer())
    if stage == "reward":
        return load_reward_data(RewardSettings(**common), tokenizer, Observer())
    return load_rl_data(RlSettings(reward_rule=("length:1",), **common), tokenizer, (), 2048, Observer())


STAGES = ("sft", "reward", "rl")


@pytest.mark.parametrize("stage", STAGES)
def test_max_samples_is_shared_over_the_files_and_said(place, stage):
    data = load(stage, "a.jsonl", "b.jsonl", max_samples=30)
    assert data.mix.sizes == [15, 15] and len(data.training) == 30
    notice = "--max-samples 30 is shared: 15 of a.jsonl, 15 of b.jsonl"
    assert notice in data.report["training"]["notices"]
    assert load(stage, "a.jsonl", "b.jsonl", max_samples=50).mix.sizes == [30, 20]
    assert load(stage, "a.jsonl:3", "b.jsonl:1", max_samples=40).mix.sizes == [30, 10]
    assert load(stage, ".", max_samples=30).mix.sizes == [30]  # both files of the folder
    assert load(stage, "a.jsonl", max_samples=7).mix.sizes == [7]


@pytest.mark.parametrize("stage", STAGES)
def test_a_weight_is_the_share_of_what_an_epoch_draws(place, stage):
    data = load(stage, "a.jsonl:1", "b.jsonl:3")
    assert data.mix.drawn == [15, 45] and len(data.mix) == 60
    assert [one["share"] for one in data.report["sources"]] == [0.25, 0.75]
    assert [one["passes_an_epoch"] for one in data.report["sources"]] == [15 / 40, 45 / 20]
    assert load(stage, "a.jsonl", "b.jsonl").mix.sampler(0) is None
    with pytest.raises(UsageError):
        load(stage, "a.jsonl:1", "b.jsonl")
    with pytest.raises(UsageError):
        load(stage, "a.jsonl:0")


def test_a_real_file_of_that_name_wins(place):
    (place / "b.jsonl").rename(place / "b.jsonl:3")
    assert parse_source("b.jsonl:3") == Source("b.jsonl:3")


def test_a_source_with_a_weight_and_nothing_left_is_refused():
    with pytest.raises(DataError, match="nothing is left"):
        mix([Source("a.jsonl", 1.0), Source("b.jsonl", 1.0)], [3, 0], [9, 0], "examples")


@pytest.mark.parametrize("by_length", [False, True])
def test_an_epoch_draws_what_the_mix_says_and_a_resumed_one_the_same(by_length):
    sizes, drawn = [8, 4], [6, 6]

    def sampler() -> EpochSampler:
        return EpochSampler(range(12), 2, 7, by_length, draw=MixingSampler(sizes, drawn, 7))

    one, taken = sampler(), []
    assert len(one) == 12
    for epoch in range(4):
        one.set_epoch(epoch)
        order = list(one)
        assert sum(index < 8 for index in order) == 6
        resumed = sampler()
        resumed.set_epoch(epoch)
        assert list(resumed) == order
        taken += [index for index in order if index < 8]
    assert sorted(taken) == sorted([*range(8)] * 3)  # three whole passes over the first source


def test_files_are_counted_no_further_than_needed():
    asked = []

    def usable(name: str, most: int) -> int:
        asked.append(most)
        return 5

    notices: list[str] = []
    assert shares_of(None, [Source("x")], usable, notices) is None
    assert asked == [] and notices == []
