"""What `--eval-fraction` keeps on one side, in every stage that learns from questions."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest

from medicalgpt_cli.engine.data import splitting
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.reward_data import load_reward_data
from medicalgpt_cli.engine.training.rl_data import load_rl_data
from medicalgpt_cli.engine.training.sft_data import load_sft_data
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.settings.stages import RewardSettings, RlSettings, SftSettings
from tests.tiny import tiny_tokenizer, write_jsonl

WORDS = [f"w{number}" for number in range(4000)]
STAGES = ("sft", "reward", "rl")
needs_datasketch = pytest.mark.skipif(
    importlib.util.find_spec("datasketch") is None, reason="near duplicates need datasketch"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


def load(stage: str, tokenizer: Any, path: Any, **options: Any) -> Any:
    common = {"train_data": (str(path),), "eval_fraction": 0.25, **options}
    if stage == "sft":
        return load_sft_data(SftSettings(**common), tokenizer, Observer())
    if stage == "reward":
        return load_reward_data(RewardSettings(**common), tokenizer, Observer())
    return load_rl_data(RlSettings(reward_rule=("length:1",), **common), tokenizer, (), 2048, Observer())


def texts(stage: str, part: Any, tokenizer: Any) -> list[str]:
    """What each training item says."""
    ids = {"sft": "input_ids", "reward": "chosen", "rl": "ids"}[stage]
    return [tokenizer.decode(getattr(part[at], ids)) for at in range(len(part))]


def row(question: str, **more: Any) -> dict[str, Any]:
    return {"question": question, "response_chosen": f"yes to {question}", "response_rejected": "no", **more}


@pytest.mark.parametrize("stage", STAGES)
def test_a_group_stands_on_one_side(stage, tokenizer, tmp_path):
    rows = [row(f"patient{n % 8} asks {n}?", bed=n % 8) for n in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for seed in range(3):
        data = load(stage, tokenizer, path, group="bed", seed=seed)
        sides = [
            {text.split("patient")[1][0] for text in texts(stage, part, tokenizer)}
            for part in (data.training, data.held_out)
        ]
        assert len(data.held_out) == 10 and len(sides[1]) == 2 and sides[0].isdisjoint(sides[1])
    with pytest.raises(DataError, match="--group ward: no record has this key"):
        load(stage, tokenizer, path, group="ward")


@needs_datasketch
@pytest.mark.parametrize("stage", STAGES)
def test_near_duplicates_stand_on_one_side(stage, tokenizer, tmp_path, monkeypatch):
    draw = random.Random(0)
    rows = []
    for family in range(20):
        question = f"family{family} {' '.join(draw.choices(WORDS, k=50))}"
        rows += [row(question), row(f"{question} please"), row(f"{question}, doctor")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)

    def families(part: Any) -> set[str]:
        return {text.split("family")[1].split()[0] for text in texts(stage, part, tokenizer)}

    data = load(stage, tokenizer, path)
    assert len(data.held_out) == 15 and len(families(data.held_out)) == 5
    assert families(data.held_out).isdisjoint(families(data.training))
    assert "40 near duplicates stand on one side of the split" in data.report["training"]["notices"]
    monkeypatch.setattr(splitting, "_MOST", 59)
    data = load(stage, tokenizer, path)
    assert not families(data.held_out).isdisjoint(families(data.training))
    assert any("near ones are looked for among up to 59" in one for one in data.report["training"]["notices"])
