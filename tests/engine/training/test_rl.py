"""`medgpt rl` as a user runs it: real processes, a tiny policy and reward model, real signals."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli import medgpt, start
from tests.engine.training.test_sft import assert_paired, assert_same, weights
from tests.tiny import tiny_model, write_jsonl

QUICK = ("--batch-size", "8", "--minibatch-size", "4", "--max-new-tokens", "6", "--learning-rate", "0.005")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    tiny_model(folder / "model")
    words = ["fever", "cough", "头痛", "糖尿病", "rest", "diet"]
    rows = [{"prompt": f"What about {word} {n}?"} for n in range(6) for word in words]
    write_jsonl(folder / "prompts.jsonl", rows)
    pairs = [{**row, "chosen": "Please rest. " * 2, "rejected": f"no {n}"} for n, row in enumerate(rows[:12])]
    write_jsonl(folder / "pairs.jsonl", pairs)
    exam = [
        {"question": f"Which is right, {n}?", "options": {"A": "this", "B": "that"}, "answer": ["AB"[n % 2]]}
        for n in range(20)
    ]
    write_jsonl(folder / "exam.jsonl", exam)
    made = medgpt(
        *("reward", "--base-model", "model", "--train-data", "pairs.jsonl", "--eval-fraction", "0.2"),
        *("--max-steps", "4", "--learning-rate", "0.01", "--output-dir", "reward"),
        cwd=folder,
    )
    assert made.returncode == 0, made.stderr
    return folder


def arguments(name: str, *more: object) -> tuple[object, ...]:
    return (
        *("rl", "--base-model", "model", "--reward-model", "reward", "--train-data", "prompts.jsonl", *QUICK),
        *("--eval-fraction", "0.5", "--max-steps", "10", "--save-steps", "2", "--output-dir", name, *more),
    )


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, dict]:
    done = medgpt(*arguments("whole", "--kl-target", "3", "--json"), cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "whole", json.loads(done.stdout)


def test_leaves_an_ordinary_adapter_and_a_full_record(whole, place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, result = whole
    assert result["steps"] == 10
    assert {"reward", "reward_low", "reward_high", "kl", "answer_tokens", "ended"} <= result["after"].keys()
    assert result["before"]["kl"] == 0
    assert result["after"]["kl"] != 0
    assert result["after"]["reward_low"] <= result["after"]["reward"] <= result["after"]["reward_high"]
    assert result["after"]["ended_low"] <= result["after"]["ended"] <= result["after"]["ended_high"]
    assert_paired(result, ("reward", "kl", "answer_tokens", "ended"))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), run / "model")
    assert not any("value" in name or "reward" in name for name in weights(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    for name in ("reward", "kl", "entropy", "clip_fraction", "value_loss", "explained_variance", "ended"):
        assert all(isinstance(line[name], float) for line in steps), name
    assert steps[0]["kl_coefficient"] != steps[-1]["kl_coefficient"]  # the price adapts
    report = (run / "report.html").read_text()
    assert "KL to the start" in report and "held-out reward" in report


def test_prompts_that_the_reward_model_knows_are_not_measured_on(whole) -> None:
    run, _ = whole
    held = json.loads((run / "run.json").read_text())["data"]["held_out"]
    assert held["skipped"]["the reward model was trained on this prompt"] > 0
    assert held["prompts"] == held["read"] - sum(held["skipped"].values())


def test_a_dry_run_shows_prompts_and_rewards(place: Path) -> None:
    done = medgpt(*arguments("never", "--reward-rule", "length:0.5", "--dry-run"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert "reward, length:0.5" in done.stdout and "length in tokens" in done.stdout
    assert not (place / "never").exists()


def test_defaults_that_depend_on_others_are_shown_and_fit_a_small_data_set(place: Path) -> None:
    """36 prompts are fewer than a rollout: each has all of them."""
    flags = (
        *("rl", "--base-model", "model", "--reward-rule", "length", "--train-data", "prompts.jsonl"),
        *("--max-new-tokens", "4", "--max-steps", "2", "--eval-fraction", "0"),
    )
    shown = medgpt(*flags, "--algorithm", "grpo", "--output-dir", "never", "--dry-run", "--json", cwd=place)
    assert shown.returncode == 0, shown.stderr
    settings = {name: one["value"] for name, one in json.loads(shown.stdout)["settings"].items()}
    assert (settings["batch_size"], settings["group_size"], settings["minibatch_size"]) == (32, 8, 64)
    assert settings["value_learning_rate"] is settings["gae_lambda"] is None
    done = medgpt(*flags, "--output-dir", "small", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "the 36 prompts are fewer than a rollout of 128: each has all of them" in done.stderr
    run = json.loads((place / "small" / "run.json").read_text())
    found = {name: one["value"] for name, one in run["settings"].items()}
    assert (found["batch_size"], found["minibatch_size"], found["micro_batch_size"]) == (128, 32, 32)
    assert (found["gae_lambda"], found["value_learning_rate"]) == (1.0, pytest.approx(5e-4))
    assert "batch-size: 128" in (place / "small" / "recipe.yaml").read_text()


def killed_and_resumed(place: Path, name: str, moment: random.Random) -> Path:
    """Kill a run at a random moment behind its start, as often as it takes to see it end."""
    process = start(*arguments(name, "--kl-target", "3"), cwd=place)
    for _ in range(20):
        deadline = time.monotonic() + 120
        while process.poll() is None and not (place / name / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(moment.uniform(0, 2.5))
        process.kill()
        process.communicate()
        if (place / name / "model").exists():
            break
        process = start("rl", "--resume", name, cwd=place)
        if moment.random() < 0.5:
            break
    _out, _problem = process.communicate(timeout=300)
    if not (place / name / "model").exists():
        done = medgpt("rl", "--resume", name, cwd=place)
        assert done.returncode == 0, done.stderr
    return place / name


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))]
)
def test_a_killed_run_goes_on_to_the_same_adapter(whole, place: Path, seed: int) -> None:
    run = killed_and_resumed(place, f"killed-{seed}", random.Random(seed))
    assert_same(weights(run), weights(whole[0]))


def test_rule_rewards_on_questions_with_options(place: Path) -> None:
    done = medgpt(
        *("rl", "--base-model", "model", "--train-data", "exam.jsonl", *QUICK, "--max-steps", "2"),
        *(
            "--reward-rule",
            "right-option",
            "--reward-rule",
            "answer-format:0.1",
            "--reward-rule",
            "length:0.2",
        ),
        *("--length-target", "3", "--eval-fraction", "0.3", "--output-dir", "rules", "--json"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # Six tokens against a target of three: half of the length's 0.2, if nothing is right.
    assert result["before"]["reward"] == pytest.approx(0.1, abs=0.06)


def test_on_top_of_an_adapter_the_reference_is_that_adapter(whole, place: Path) -> None:
    done = medgpt(
        *("rl", "--lora-model", "whole", "--reward-rule", "length", "--train-data", "prompts.jsonl", *QUICK),
        *("--max-steps", "2", "--output-dir", "again", "--json"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["before"]["kl"] == 0
    config = json.loads((place / "again" / "model" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).resolve() == (place / "model").resolve()


def test_a_reward_model_over_other_weights(place: Path, tmp_path: Path) -> None:
    tiny_model(tmp_path / "other", "llama3", seed=5)
    made = medgpt(
        *(
            "reward",
            "--base-model",
            tmp_path / "other",
            "--train-data",
            place / "pairs.jsonl",
            "--tuning",
            "full",
        ),
        *("--max-steps", "2", "--output-dir", tmp_path / "reward"),
    )
    assert made.returncode == 0, made.stderr
    done = medgpt(
        *(
            "rl",
            "--base-model",
            "model",
            "--reward-model",
            tmp_path / "reward",
            "--train-data",
            "prompts.jsonl",
        ),
        *(*QUICK, "--max-steps", "2", "--output-dir", tmp_path / "run"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert "weights of its own" in done.stderr


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (("--reward-model", "model"), "not a reward model"),
        (("--reward-model", "missing"), "no model named missing"),
        ((), "no reward is named"),
        (("--reward-rule", "rigth-option"), "no such rule"),
        (("--reward-rule", "right-option"), "has no options and answer"),
        (("--reward-rule", "length", "--max-prompt-length", "8"), "no prompt is left"),
        (("--reward-rule", "length", "--gradient-accumulation", "2"), "not for rl"),
        (("--reward-rule", "length", "--minibatch-size", "64"), "larger than --batch-size"),
        (("--reward-rule", "length", "--group-size", "8"), "--group-size is not for ppo"),
        (("--reward-rule", "length", "--algorithm", "rloo", "--gamma", "0.9"), "--gamma is not for rloo"),
    ],
)
def test_wrong_settings(place: Path, given, word: str) -> None:
    done = medgpt(
        *("rl", "--base-model", "model", "--train-data", "prompts.jsonl", "--batch-size", "8", *(
            () if "--minibatch-size" in given else ("--minibatch-size", "4")
        ), *given, "--output-dir", "never"),
        cwd=place,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert word in done.stderr and "hint:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_other_algorithms_leave_the_same_kind_of_run(place: Path, tmp_path: Path, algorithm: str) -> None:
    flags = (
        "--algorithm",
        algorithm,
        "--batch-size",
        "4",
        "--reward-rule",
        "length",
        "--kl-coefficient",
        "0.2",
    )
    whole = medgpt(*arguments(tmp_path / "whole", *flags, "--json"), cwd=place)
    assert whole.returncode == 0, whole.stderr
    record = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"reward", "reward_reward_model", "reward_length", "kl", "policy_loss"} <= record[0].keys()
    assert not any("value" in name for name in record[0])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-10")
    shutil.rmtree(tmp_path / "cut" / "model")
    run = json.loads((tmp_path / "cut" / "run.json").read_text())
    (tmp_path / "cut" / "run.json").write_text(json.dumps({**run, "status": "stopped"}))
    done = medgpt("rl", "--resume", tmp_path / "cut", cwd=place)
    assert done.returncode == 0, done.stderr
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize("kind", ["untrained", "torn", "constant", "nan"])
def test_a_reward_model_that_cannot_be_trusted(place: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(place / "reward" / "model", tmp_path / "bad")
    if kind == "untrained":
        record = json.loads((tmp_path / "bad" / "reward.json").read_text())
        (tmp_path / "bad" / "reward.json").write_text(json.dumps({**record, "head_trained": False}))
    elif kind == "torn":
        (tmp_path / "bad" / "reward.json").write_text('{"head_trai')
    else:
        file = tmp_path / "bad" / "adapter_model.safetensors"
        content = load_file(file)
        head = next(name for name in content if ".score." in name)
        content[head] = torch.full_like(content[head], float("nan") if kind == "nan" else 0.0)
        save_file(content, file)
    done = medgpt(
        *("rl", "--base-model", "model", "--reward-model", tmp_path / "bad", "--train-data", "prompts.jsonl"),
        *(*QUICK, "--max-steps", "2", "--output-dir", tmp_path / "run"),
        cwd=place,
    )
    word = {
        "untrained": "never trained",
        "torn": "not a JSON object",
        "constant": "the same score",
        "nan": "numbers that are not finite",
    }[kind]
    assert done.returncode == 2, done.stderr
    assert word in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_a_model_whose_own_attention_is_not_sdpa(tmp_path: Path) -> None:
    """Gemma 2 has a cap on its scores, which the library computes with its eager attention alone."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tiny_model(tmp_path / "model", "gemma")  # for the tokenizer
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=1300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    (tmp_path / "model" / "generation_config.json").unlink()
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What about fever {n}?"} for n in range(12)])
    done = medgpt(
        *("rl", "--base-model", "model", "--train-data", "prompts.jsonl", "--reward-rule", "length:1"),
        *("--batch-size", "4", "--minibatch-size", "2", "--max-new-tokens", "12", "--max-steps", "2"),
        *("--eval-fraction", "0.3", "--output-dir", "run", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 2 and result["before"]["kl"] == 0
