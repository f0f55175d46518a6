"""A reward model learns a preference, and its scores are what plain PEFT and transformers compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import render_answer
from medicalgpt_cli.engine.data.preferences import audit, load_pairs
from medicalgpt_cli.engine.evaluation.preferences import judge
from medicalgpt_cli.engine.evaluation.statistics import wilson_interval
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.loop import run
from medicalgpt_cli.engine.training.reward import RewardStage
from medicalgpt_cli.settings.stages import RewardSettings
from tests.cli import medgpt
from tests.tiny import tiny_model, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    tiny_model(folder / "model")
    words = ["fever", "cough", "头痛", "糖尿病", "rest", "diet", "感冒", "leukemia"]
    rows = []
    for n in range(12):
        for word in words:
            good, bad = (
                f"Please check with your doctor about {word}.",
                f"no {word} whatever you say, go away now and do not ask again.",
            )
            rows.append({"prompt": f"What about {word} {n}?", "chosen": good, "rejected": bad})
    write_jsonl(folder / "pairs.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Path, dict]:
    settings = RewardSettings(
        base_model=str(place / "model"),
        train_data=(str(place / "pairs.jsonl"),),
        eval_fraction=0.25,
        max_steps=25,
        batch_size=8,
        learning_rate=5e-3,
        eval_steps=1000,
        save_steps=1000,
        use_cpu=True,
        output_dir=place / "run",
    )
    return place / "run", run(RewardStage(settings, Observer()), Observer())


def test_learns_a_simple_preference(trained) -> None:
    run_folder, result = trained
    before, after = result["before"]["parts"][0], result["after"]["parts"][0]
    assert before["accuracy"] < 0.9
    assert after["accuracy"] > 0.95 and after["margin"] > 1
    assert after["low"] < after["accuracy"] <= after["high"] + 1e-12
    assert after["longer_wins"] < 0.5  # it did not learn length: the worse answer is the longer one
    record = json.loads((run_folder / "model" / "reward.json").read_text())
    assert record["head_trained"] is True
    assert all(len(one) == 24 and int(one, 16) >= 0 for one in record["trained_on"])  # hashes, no text


def test_scores_are_those_of_plain_peft(trained, place: Path, tmp_path: Path) -> None:
    """The head on the last hidden state of the answer's last token, one answer at a time."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    run_folder, _ = trained
    done = medgpt(
        *("score", "--reward-model", run_folder, "--data-file", place / "pairs.jsonl"),
        *("--predictions-file", "-", "--batch-size", "5"),
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    base = AutoModelForSequenceClassification.from_pretrained(
        place / "model", num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, run_folder / "model").eval().get_base_model()
    tokenizer = tiny_tokenizer()
    for pair, line in list(
        zip(load_pairs([str(place / "pairs.jsonl")], Counts(), Observer()), lines, strict=True)
    )[:6]:
        for answer, found in ((pair.chosen, line["score_chosen"]), (pair.rejected, line["score_rejected"])):
            messages = [*pair.messages, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            assert ids[0, -1] == tokenizer.eos_token_id
            with torch.no_grad():
                hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
                assert float(model.score(hidden)) == pytest.approx(found, abs=1e-4)


@pytest.mark.parametrize("size", [1, 16])
def test_scores_do_not_depend_on_layout_or_batch(trained, place: Path, size: int) -> None:
    from functools import partial

    from medicalgpt_cli.engine.evaluation.preferences import score_rows
    from medicalgpt_cli.engine.model.loading import load_tokenizer
    from medicalgpt_cli.engine.model.references import resolve_models
    from medicalgpt_cli.engine.model.reward_model import load_reward_model
    from medicalgpt_cli.engine.training import attention
    from medicalgpt_cli.engine.training.reward_data import laid_end_to_end, padded_right
    from medicalgpt_cli.settings.groups import ModelSettings

    named = ModelSettings(base_model=str(trained[0]), use_cpu=True)
    resolved = resolve_models(named)
    tokenizer = load_tokenizer(named, resolved)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the end must not be found by its id
    model = load_reward_model(resolved, torch.float32, torch.device("cpu"))
    pairs = load_pairs([str(place / "pairs.jsonl")], Counts(), Observer())[:12]
    sides = [render_answer(tokenizer, pair.messages, pair.chosen, 512) for pair in pairs]
    rows = [prompt + answer for prompt, answer in sides]
    padded = score_rows(model, rows, partial(padded_right, pad_id=tokenizer.pad_token_id), batch_size=size)
    with attention.for_batches(model, True):
        laid = score_rows(model, rows, laid_end_to_end, batch_size=5)
    assert padded == pytest.approx(laid, abs=1e-5)


def test_begins_exactly_at_the_sft_adapter(place: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "qa.jsonl", [{"question": f"q{n}", "answer": "rest"} for n in range(8)])
    tuned = medgpt(
        *("sft", "--base-model", place / "model", "--train-data", tmp_path / "qa.jsonl", "--max-steps", "2"),
        *(
            "--learning-rate",
            "0.01",
            "--eval-questions",
            "0",
            "--lora-rank",
            "4",
            "--output-dir",
            tmp_path / "sft",
        ),
    )
    assert tuned.returncode == 0, tuned.stderr
    settings = RewardSettings(
        lora_model=str(tmp_path / "sft"), train_data=(str(place / "pairs.jsonl"),), use_cpu=True
    )
    stage = RewardStage(settings, Observer())
    model = stage.load(Observer())
    begun = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    saved = load_file(tmp_path / "sft" / "model" / "adapter_model.safetensors")
    assert len(begun) == len(saved)
    for name, weight in begun.items():
        assert torch.equal(weight, saved[name.replace(".default", "")]), name
        assert weight.requires_grad


def test_figures_by_hand() -> None:
    found = judge(
        [2.0, 1.0, 0.0, 0.5], [1.0, 3.0, 0.0, 0.0], [0.0] * 4, [True, False, None, True], ["a", "a", "a", "b"]
    )
    a, b = found["parts"]
    assert a["pairs"] == 3 and a["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert (a["low"], a["high"]) == pytest.approx(wilson_interval(1.5, 3))
    assert a["margin"] == pytest.approx((1 - 2 + 0) / 3)
    assert a["longer_wins"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert a["by_length"]["chosen shorter"] == {"pairs": 1, "accuracy": 0.0}
    assert b["accuracy"] == 1.0
    # -ln sigmoid of 1, -2, 0 and 0.5
    assert found["loss"] == pytest.approx((0.313262 + 2.126928 + 0.693147 + 0.474077) / 4, abs=1e-6)


def test_audit_by_hand(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "long answer", "rejected": "no"},
        {"prompt": "a", "chosen": "long answer", "rejected": "no"},
        {"prompt": "a", "chosen": "no", "rejected": "long answer"},
        {"prompt": "b", "chosen": "yes", "rejected": "nay"},
        {"prompt": "c", "chosen": "same", "rejected": " same "},
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    counts = Counts()
    pairs = load_pairs([str(tmp_path / "pairs.jsonl")], counts, Observer())
    assert counts.skipped == {"both answers are the same": 1}
    found = audit(pairs)
    assert (found["pairs"], found["prompts"], found["repeated"], found["contradicting"]) == (4, 2, 1, 1)
    assert found["longer_chosen"] == pytest.approx(2 / 3)


def test_an_answer_is_never_cut_but_history_is() -> None:
    tokenizer = tiny_tokenizer()
    history = [
        {"role": "user", "content": "first question " * 20},
        {"role": "assistant", "content": "first answer " * 20},
        {"role": "user", "content": "second question"},
    ]
    whole = render_answer(tokenizer, history, "the answer", 10_000)
    short = render_answer(tokenizer, history, "the answer", 120)
    assert short[1] == whole[1] and len(short[0]) < len(whole[0])
    assert "second question" in tokenizer.decode(short[0]) and "first" not in tokenizer.decode(short[0])
    assert render_answer(tokenizer, history, "a long answer " * 50, 120) is None


@pytest.mark.parametrize(
    ("name", "kept", "skipped"), [("pref_same", 1, 1), ("pref_empty", 1, 2), ("pref_conflict", 2, 0)]
)
def test_bad_pairs_are_counted(name: str, kept: int, skipped: int) -> None:
    counts = Counts()
    bad = Path(__file__).parents[2] / "data" / "bad"
    assert len(load_pairs([str(bad / f"{name}.jsonl")], counts, Observer())) == kept
    assert sum(counts.skipped.values()) == skipped


@pytest.mark.parametrize(("name", "line"), [("pref_missing", 2), ("pref_swapped_type", 2)])
def test_bad_pairs_are_named(name: str, line: int) -> None:
    bad = Path(__file__).parents[2] / "data" / "bad"
    done = medgpt("reward", "--base-model", "x", "--train-data", bad / f"{name}.jsonl", "--dry-run")
    assert done.returncode == 2
    from medicalgpt_cli.errors import DataError

    with pytest.raises(DataError, match=f"{name}.jsonl:{line}"):
        load_pairs([str(bad / f"{name}.jsonl")], Counts(), Observer())
