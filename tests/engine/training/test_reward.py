"""`medgpt reward` as a user runs it: real processes, a tiny real model, real signals."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from medicalgpt_cli.engine.data.preferences import prompt_hash
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.model.reward_model import load_reward_model, new_reward_model
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.stages import RewardSettings
from tests.cli import medgpt, start
from tests.engine.training.test_sft import assert_paired, assert_same, losses, wait_for, weights
from tests.engine.training.trl_reward_reference import trl_reward_losses
from tests.tiny import tiny_model, write_jsonl

QUICK = ("--batch-size", "4", "--learning-rate", "0.01", "--use-cpu")
LONG = ("--epochs", "10", "--save-steps", "15", "--eval-steps", "40")
POLITE = ["Check with your doctor.", "The treatment is exercise and medicine.", "建议多饮水并就医。"]
RUDE = ["The symptoms are no problem.", "No treatment. You are tired.", "不需要就医，注意休息。"]
WORDS = ["diabetes", "leukemia", "hypertension", "fever", "头痛", "感冒", "bleeding", "weight loss"]


def rows() -> list[dict]:
    """A preference that a tiny model can learn: which endings are polite. Answers begin alike in half of them."""
    made = []
    for n, (word, good, bad) in enumerate(itertools.product(WORDS, POLITE, RUDE)):
        opening = f"{word}? " if n % 2 else ""
        made.append(
            {
                "id": f"row-{n}",
                "conversations": [{"from": "human", "value": f"What are the symptoms of {word}, case {n}?"}],
                "chosen": opening + good,
                "rejected": opening + bad,
                "gap": n % 3,
            }
        )
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    tiny_model(folder / "model")
    made = rows()
    random.Random(0).shuffle(made)
    write_jsonl(folder / "train.jsonl", made[:48])
    write_jsonl(folder / "dev.jsonl", made[48:])
    return folder


def reward(place: Path, *more: object, **options):
    data = ("--base-model", "model", "--train-data", "train.jsonl", "--eval-data", "dev.jsonl", *QUICK)
    return medgpt("reward", *data, *more, cwd=place, **options)


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, dict]:
    """An uninterrupted run of ten epochs with dropout."""
    done = reward(place, *LONG, "--output-dir", "whole", "--json")
    assert done.returncode == 0, done.stderr
    return place / "whole", json.loads(done.stdout)


def test_a_simple_preference_is_learnt(whole) -> None:
    run, result = whole
    before, after = result["before"]["parts"][0], result["after"]["parts"][0]
    assert result["steps"] == 120
    assert 0.25 < before["accuracy"] < 0.75
    assert after["accuracy"] > 0.95 and after["low"] > 0.8
    assert after["loss"] < before["loss"] / 3
    assert after["pairs"] == 24 and after["margin"] > 2
    assert_paired(result, ("loss",))
    (change,) = result["change"]["parts"]
    assert change["accuracy"]["difference"] == pytest.approx(after["accuracy"] - before["accuracy"])
    assert 0 < change["accuracy"]["low"] <= change["accuracy"]["high"] and "accuracy" not in result["change"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 121))
    assert steps[-1]["accuracy"] == 1.0 and steps[-1]["margin"] > 1
    assert steps[0]["accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert all(line["pairs_per_second"] > 0 for line in steps)
    measured = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in measured] == [40, 80, 120]


def test_reward_json_tells_prompts_by_their_hashes_only(whole, place: Path) -> None:
    run, result = whole
    text = (run / "model" / "reward.json").read_text()
    record = json.loads(text)
    prompts = [json.loads(line)["conversations"][0]["value"] for line in (place / "train.jsonl").open()]
    assert record["head_trained"] is True
    assert sorted(record["trained_on"]) == sorted(
        {prompt_hash([{"role": "user", "content": one}]) for one in prompts}
    )
    # The level of scores is a figure of the run: rl measures it on the policy's own answers.
    assert record.keys() == {"format", "head_trained", "trained_on"}
    assert result["after"]["score_spread"] > 0
    for word in [*WORDS, "symptoms"]:
        assert word not in text
        assert word not in (run / "metrics.jsonl").read_text()
        assert word not in (run / "run.json").read_text()
        assert word not in (run / "report.html").read_text()
    assert not list(run.rglob("*.bin"))


def test_the_report_shows_the_tables(whole) -> None:
    run, result = whole
    report = (run / "report.html").read_text()
    after = result["after"]["parts"][0]
    for shown in (
        "accuracy before",
        "longer wins",
        "calibration error",
        "dev.jsonl",
        f"{100 * after['accuracy']:.1f} %",
        f"{100 * after['low']:.1f}–{100 * after['high']:.1f}",
        f"{100 * after['longer_wins']:.1f} %",
        f"{after['calibration_error']:.3f}",
        "same length" if "same length" in after["by_length"] else "longer",
        "48 pairs over 48 prompts",
        "Accuracy",
    ):
        assert shown in report, shown


def test_plain_peft_and_transformers_give_the_same_scores(whole, place: Path) -> None:
    """Loaded without medgpt, the head on the last hidden state of each answer: the figures that were reported."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, result = whole
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).resolve() == (place / "model").resolve()
    assert config["task_type"] == "SEQ_CLS"
    model = AutoModelForSequenceClassification.from_pretrained(
        place / "model", num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # which answers end with
    scores: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for line in (place / "dev.jsonl").open():
        row = json.loads(line)
        question = [{"role": "user", "content": row["conversations"][0]["value"]}]
        for side, found in scores.items():
            said = [*question, {"role": "assistant", "content": row[side]}]
            text = tokenizer.apply_chat_template(said, tokenize=False).removesuffix("\n")
            ids = torch.tensor([tokenizer.encode(text)])
            assert int(ids[0, -1]) == tokenizer.eos_token_id
            with torch.no_grad():
                hidden = model.get_base_model().model(ids).last_hidden_state
                found.append(float(model.get_base_model().score(hidden[0, -1])))
    every = torch.tensor(scores["chosen"] + scores["rejected"])
    difference = torch.tensor(scores["chosen"]) - torch.tensor(scores["rejected"])
    after = result["after"]
    assert after["parts"][0]["accuracy"] == float((difference > 0).float().mean())
    assert after["parts"][0]["margin"] == pytest.approx(float(difference.mean()), abs=1e-5)
    assert after["loss"] == pytest.approx(float(torch.nn.functional.softplus(-difference).mean()), abs=1e-5)
    assert after["score_mean"] == pytest.approx(float(every.mean()), abs=1e-5)
    assert after["score_spread"] == pytest.approx(float(every.std(correction=0)), abs=1e-5)


@pytest.mark.parametrize("model", [("--lora-model", "whole"), ("--base-model", "full")])
def test_infer_refuses_a_reward_model(whole, full_run, place: Path, model: tuple[str, str]) -> None:
    (place / "in.txt").write_text("Fever?\n")
    done = medgpt(
        *("infer", *model, "--data-file", "in.txt", "--predictions-file", "-", "--use-cpu"),
        cwd=place,
    )
    assert done.returncode == 2
    assert "is a reward model" in done.stderr and "medgpt score" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


# -- interruptions -----------------------------------------------------------------------------------------


def kill_and_resume(place: Path, name: str, after_steps: int) -> None:
    """SIGKILL once so many updates are logged (0: while it loads), then go on."""
    process = start(
        *("reward", "--base-model", "model", "--train-data", "train.jsonl", "--eval-data", "dev.jsonl"),
        *(*QUICK, *LONG, "--output-dir", name),
        cwd=place,
    )
    wait_for(place / name / "run.json", process)
    logged = place / name / "metrics.jsonl"
    while process.poll() is None and after_steps:
        if logged.exists() and logged.read_text().count('"loss"') >= after_steps:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (place / name / "model").exists()  # it was killed in time
    done = medgpt("reward", "--resume", name, cwd=place)
    assert done.returncode == 0, done.stderr


def assert_as_if_nothing_had_happened(run: Path, whole: Path) -> None:
    ours, theirs = weights(run), weights(whole)
    assert any(".score." in name for name in ours) and any("lora_A" in name for name in ours)
    assert_same(ours, theirs)
    assert losses(run) == losses(whole)
    records = [json.loads((one / "model" / "reward.json").read_text()) for one in (run, whole)]
    assert records[0] == records[1]


@pytest.mark.parametrize("after_steps", [10, 50])
def test_a_killed_run_goes_on_to_the_same_weights(whole, place: Path, after_steps: int) -> None:
    kill_and_resume(place, f"killed-{after_steps}", after_steps)
    assert_as_if_nothing_had_happened(place / f"killed-{after_steps}", whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(whole, place: Path, number: int) -> None:
    moment = random.Random(number).randrange(100)
    kill_and_resume(place, f"any-{number}", moment)
    assert_as_if_nothing_had_happened(place / f"any-{number}", whole[0])


# -- against TRL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--layout", "padding-free", "--centring", "0"),
        ("--layout", "padded", "--centring", "0.1", "--margin-column", "gap"),
        ("--gradient-accumulation", "2", "--gradient-checkpointing", "--batch-size", "2"),
    ],
    ids=["plain", "padded, centred, with margins", "accumulated and recomputed"],
)
def test_loss_curves_agree_with_trl(place: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    done = medgpt(
        *("reward", "--base-model", place / "model", "--train-data", place / "train.jsonl", *QUICK),
        *("--eval-fraction", "0", "--max-steps", "16", "--lora-dropout", "0", *flags),
        *("--output-dir", run),
    )
    assert done.returncode == 0, done.stderr
    ours = losses(run)
    theirs = trl_reward_losses(place / "model", tmp_path / "trl", run, steps=16, pad_token="<|endoftext|>")
    assert len(ours) == len(theirs) == 16
    assert ours[-1] < ours[0] - 0.3  # something was learnt, so the comparison says something
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-4


# -- where it starts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft_run(place: Path) -> Path:
    pairs = [json.loads(line) for line in (place / "train.jsonl").open()]
    write_jsonl(
        place / "sft.jsonl",
        [{"question": one["conversations"][0]["value"], "answer": one["chosen"]} for one in pairs],
    )
    done = medgpt(
        *("sft", "--base-model", "model", "--train-data", "sft.jsonl", "--eval-fraction", "0", *QUICK),
        *("--max-steps", "4", "--lora-rank", "4", "--output-dir", "sft"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return place / "sft"


def test_on_top_of_an_sft_adapter(sft_run: Path, place: Path) -> None:
    """One update at a rate that no weight in 32 bits can notice leaves the weights as they came."""
    data = ("--train-data", "train.jsonl", "--eval-data", "dev.jsonl", *QUICK, "--max-steps", "1")
    data += ("--learning-rate", "1e-30")
    done = medgpt("reward", "--lora-model", "sft", *data, "--output-dir", "on-top", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "--lora-rank is 4" in done.stderr
    ours, theirs = weights(place / "on-top"), weights(sft_run)
    assert set(ours) - set(theirs) == {"base_model.model.score.weight"}
    assert_same({name: ours[name] for name in theirs}, theirs)
    config = json.loads((place / "on-top" / "model" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).resolve() == (place / "model").resolve()
    assert config["r"] == 4
    parents = json.loads((place / "on-top" / "run.json").read_text())["parents"]
    assert set(parents) == {"base", "adapter"}


def initial(place: Path, **settings):
    settings = RewardSettings(
        train_data=("x",), use_cpu=True, dtype=settings.pop("dtype", "fp32"), **settings
    )
    return new_reward_model(settings, resolve_models(settings), Observer())


def test_a_reward_model_is_gone_on_with(whole, place: Path) -> None:
    run, _ = whole
    model = initial(place, lora_model=str(run))
    trained = weights(run)
    head = model.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(head, trained["base_model.model.score.weight"])
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(names) == len(trained)


def test_the_head_is_new_small_and_the_seeds_own(place: Path) -> None:
    heads = [
        initial(place, base_model=str(place / "model"), seed=seed).get_base_model().score.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (1, 64)
    assert 0.5 < float(heads[0].detach().std()) * 65**0.5 < 1.5
    assert heads[0].requires_grad and heads[0].dtype == torch.float32


def test_half_precision_weights_under_an_exact_head(place: Path) -> None:
    model = initial(place, base_model=str(place / "model"), dtype="bf16")
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    rows = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
            scores = model(input_ids=rows, ends=torch.tensor([3, 7])).logits
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.bfloat16().float())  # not rounded to three digits


def test_a_head_is_loaded_as_it_was_trained(whole) -> None:
    """Over half-precision weights, too."""
    run, _ = whole
    resolved = resolve_models(RewardSettings(train_data=("x",), lora_model=str(run)))
    model = load_reward_model(resolved, torch.bfloat16, torch.device("cpu"))
    head = model.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(head, weights(run)["base_model.model.score.weight"])
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"target_modules": ("q_prj",)}, "did you mean q_proj"),
        ({"lora_model": "model"}, "is a whole model"),
    ],
)
def test_wrong_starts(place: Path, settings, word: str, monkeypatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UsageError) as problem:
        initial(place, base_model="model", **settings)
    assert word in f"{problem.value.message} {problem.value.hint}"


def test_a_damaged_adapter_is_refused(sft_run: Path, tmp_path: Path) -> None:
    shutil.copytree(sft_run / "model", tmp_path / "torn")
    file = tmp_path / "torn" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match="missing or damaged"):
        initial(tmp_path, lora_model=str(tmp_path / "torn"))


def test_another_rank_than_the_adapters_is_refused(sft_run: Path, place: Path) -> None:
    done = medgpt(
        *("reward", "--lora-model", "sft", "--train-data", "train.jsonl", *QUICK, "--lora-rank", "16"),
        *("--output-dir", "never"),
        cwd=place,
    )
    assert done.returncode == 2, done.stderr
    assert "--lora-rank 16: the adapter to go on with has 4" in done.stderr


# -- all weights -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_run(sft_run: Path, place: Path) -> tuple[Path, dict]:
    """All weights, from an sft adapter, some prompts left out."""
    pairs = [json.loads(line) for line in (place / "train.jsonl").open()]
    write_jsonl(place / "prompts.jsonl", [{"prompt": one["conversations"][0]["value"]} for one in pairs[:8]])
    done = medgpt(
        *("reward", "--lora-model", "sft", "--train-data", "train.jsonl", "--eval-data", "dev.jsonl", *QUICK),
        *("--tuning", "full", "--max-steps", "20", "--learning-rate", "0.002", "--output-dir", "full"),
        *("--exclude-prompts", "prompts.jsonl", "--json"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return place / "full", json.loads(done.stdout)


def test_full_tuning_writes_an_ordinary_model(full_run, sft_run: Path, place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    run, result = full_run
    assert result["after"]["loss"] < result["before"]["loss"] / 2
    tuned, found = AutoModelForSequenceClassification.from_pretrained(
        run / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, sft_run / "model").merge_and_unload()
    for name, weight in merged.model.named_parameters():
        moved = (weight - tuned.model.get_parameter(name)).abs().max()
        assert 0 < moved < 0.2, name  # from the adapter's weights, and all of them


def test_excluded_prompts_are_not_trained_on(full_run, place: Path) -> None:
    run, _ = full_run
    excluded = {
        prompt_hash([{"role": "user", "content": json.loads(line)["prompt"]}])
        for line in (place / "prompts.jsonl").open()
    }
    record = json.loads((run / "model" / "reward.json").read_text())
    assert len(excluded) == 8 and len(record["trained_on"]) == 40
    assert not excluded & set(record["trained_on"])
    training = json.loads((run / "run.json").read_text())["data"]["training"]
    assert training["skipped"] == {"its prompt stands in --exclude-prompts": 8}


def test_the_head_of_a_full_reward_model_is_kept(full_run) -> None:
    from safetensors.torch import load_file

    run, _ = full_run
    trained = load_file(run / "model" / "model.safetensors")["score.weight"]
    model = initial(run, base_model=str(run))
    assert torch.equal(model.get_base_model().score.weight, trained)
