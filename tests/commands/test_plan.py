"""`medgpt plan` in real processes: against the run's own figures, and what is refused before weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.cli import medgpt
from tests.conftest import DATA
from tests.serving.running import free_port
from tests.tiny import tiny_model, tiny_tokenizer, write_jsonl

TRAIN = DATA / "medquad_en_alpaca.jsonl"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny_model(folder / "model")
    rows = [{"prompt": f"What about fever {n}?"} for n in range(12)]
    write_jsonl(folder / "prompts.jsonl", rows)
    pairs = [{**row, "chosen": "Please rest.", "rejected": f"no {n}"} for n, row in enumerate(rows)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "text.jsonl", [{"text": "Fever is a sign. " * 30} for _ in range(9)])
    huge = LlamaConfig(
        vocab_size=1500, hidden_size=32768, intermediate_size=131072, num_hidden_layers=96,
        num_attention_heads=256, num_key_value_heads=32,
    )  # fmt: skip
    huge.save_pretrained(folder / "huge")
    huge.architectures = ["LlamaForSequenceClassification"]
    huge.save_pretrained(folder / "huge-reward")
    for name in ("huge", "huge-reward"):
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "ask.txt").write_text("What is fever?\n", encoding="utf-8")
    return folder


def stage(place: Path, name: str, *more: object) -> tuple[object, ...]:
    data = {"sft": TRAIN, "pretrain": place / "text.jsonl", "reward": place / "pairs.jsonl"}
    file = data.get(name, place / "prompts.jsonl")
    own = ("--reward-rule", "length") if name == "rl" else ()
    own = (*own, "--block-size", 64) if name == "pretrain" else own
    return (name, "--base-model", place / "model", "--train-data", file, "--use-cpu", *own, *more)


def planned(place: Path, name: str, *more: object) -> dict:
    done = medgpt("plan", *stage(place, name, "--throughput", 1000, "--json", *more))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def sft_run(place: Path) -> Path:
    done = medgpt(*stage(place, "sft", "--epochs", 2, "--output-dir", place / "run"))
    assert done.returncode == 0, done.stderr
    assert "plan: " in done.stderr
    return place / "run"


def test_the_run_does_what_the_plan_says(place: Path, sft_run: Path) -> None:
    plan = planned(place, "sft", "--epochs", 2)
    run = json.loads((sft_run / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (sft_run / "metrics.jsonl").read_text().splitlines()]
    assert plan["updates"] == run["result"]["steps"] == max(line["step"] for line in lines)
    assert plan["tokens"] == 2 * run["data"]["training"]["tokens"]
    assert plan["time"]["seconds"] == plan["tokens"] / 1000
    saved = sum(file.stat().st_size for file in (sft_run / "model").glob("adapter_model.safetensors"))
    assert plan["disk"]["result"] == pytest.approx(saved, rel=0.1)


def test_a_run_tells_how_fast_it_goes(place: Path, sft_run: Path) -> None:
    run = json.loads((sft_run / "run.json").read_text(encoding="utf-8"))
    done = medgpt("plan", *stage(place, "sft", "--epochs", 4, "--throughput", sft_run, "--json"))
    assert json.loads(done.stdout)["time"]["seconds"] == pytest.approx(2 * run["result"]["seconds"], rel=0.01)
    refused = medgpt("plan", *stage(place, "sft", "--throughput", place / "model"))
    assert refused.returncode == 2


@pytest.mark.parametrize("name", ["pretrain", "reward", "rl"])
def test_every_stage_has_a_plan(place: Path, name: str) -> None:
    plan = planned(place, name)
    parts = {key: size for key, size in plan["memory"].items() if key not in ("peak", "loading", "cache")}
    assert plan["memory"]["peak"] in (sum(parts.values()), plan["memory"]["loading"])
    assert plan["fits"] and plan["flops"] > 0 and plan["trainable"] > 0
    assert (plan["roles"] is not None) == (name == "rl")


def test_a_file_of_questions_has_a_plan(place: Path) -> None:
    (place / "ask.txt").write_text("Why?\nWhat about fever, cough and a headache?\nHow?\n", encoding="utf-8")
    flags = (
        "--base-model",
        place / "model",
        "--data-file",
        place / "ask.txt",
        "--max-new-tokens",
        20,
        "--use-cpu",
    )
    done = medgpt("plan", "infer", *flags, "--batch-size", 2, "--throughput", 30, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    config = LlamaConfig.from_pretrained(place / "model")
    longest = plan["batch"]["longest"]
    positions = 2 * (longest + 20)  # 2 rows
    head = config.hidden_size // config.num_attention_heads
    assert (
        plan["memory"]["cache"]
        == 2 * config.num_hidden_layers * config.num_key_value_heads * head * positions * 4
    )
    assert plan["fits"] and plan["largest_batch"] == plan["questions"] == 3
    assert plan["answer_tokens"] == 60 and plan["time"]["seconds"] == 2
    asked = medgpt("infer", *flags, "--predictions-file", "-", "--batch-size", 3)
    rows = [json.loads(line) for line in asked.stdout.splitlines()]
    assert plan["tokens"] == sum(row["prompt_tokens"] for row in rows)
    shown = medgpt("plan", "infer", *flags, "--throughput", 30, "--processes", 2).stdout
    for word in ("each of 2 processes", "keys and values", "at their longest", "about 2 s"):
        assert word in shown
    assert "learn" not in shown and "ZeRO" not in shown
    tight = medgpt("plan", "infer", *flags, "--device-memory", "1MB", "--throughput", 30)
    assert tight.returncode == 0 and "does not fit" in tight.stdout
    refused = medgpt("plan", "infer", *flags, "--throughput", place / "model")
    assert refused.returncode == 2 and "not a number" in refused.stderr


def test_what_the_stage_would_refuse_is_not_planned(place: Path) -> None:
    assert all(
        (peaks["zero3"], peaks["fsdp"]) == (None, None) and peaks["zero2"] > 0
        for peaks in planned(place, "rl", "--plan-for", "gpu")["several"].values()
    )
    assert planned(place, "sft", "--plan-for", "gpu")["several"]["2"]["fsdp"] > 0
    here = planned(place, "sft")["several"]["2"]
    assert here["zero3"] > 0 and here["fsdp"] is None  # on a processor
    shown = medgpt("plan", *stage(place, "rl", "--throughput", 1000))
    assert shown.stdout.count("refused") == 6, shown.stdout
    for command in (("plan", "rl"), ("rl", "--dry-run")):
        done = medgpt(*command, *stage(place, "rl", "--parallel", "zero3", "--processes", 2)[1:])
        assert done.returncode == 2 and "--parallel zero3 is not for rl" in done.stderr


def test_what_is_shown(place: Path) -> None:
    asked = ("--plan-for", "gpu", "--device-memory", "24GB", "--devices", 4, "--load-in-4bit")
    done = medgpt("plan", *stage(place, "sft", "--throughput", 1000, *asked))
    assert done.returncode == 0, done.stderr
    for word in (
        "parameters",
        "weights that stay",
        "AdamW's moments",
        "22.4 GiB: fits",
        "ZeRO-3",
        "4 bits",
        "updates",
    ):
        assert word in done.stdout
    assert "read" not in done.stdout  # what the data are goes elsewhere


def test_a_run_that_cannot_fit_stops_before_it_loads(place: Path) -> None:
    huge = (
        "sft",
        "--base-model",
        place / "huge",
        "--train-data",
        TRAIN,
        "--use-cpu",
        "--output-dir",
        place / "no",
    )
    done = medgpt(*huge)
    assert done.returncode == 3
    assert "GiB of memory" in done.stderr and "a smaller model" in done.stderr and "--force" in done.stderr
    assert not (place / "no").exists()
    forced = medgpt(*huge, "--force")
    assert forced.returncode == 2 and "huge" in forced.stderr  # it has no weights to load


@pytest.mark.parametrize(
    "command",
    [
        ("infer", "--base-model", "huge", "--data-file", "ask.txt", "--predictions-file", "no.json"),
        ("infer", "--base-model", "huge", "--interactive"),
        ("chat", "--base-model", "huge"),
        ("serve-demo", "--base-model", "huge", "--port", str(free_port())),
        (
            "score",
            "--reward-model",
            "huge-reward",
            "--data-file",
            "pairs.jsonl",
            "--predictions-file",
            "no.json",
        ),
    ],
)
def test_a_model_that_cannot_fit_is_not_loaded_to_answer(place: Path, command: tuple[str, ...]) -> None:
    done = medgpt(*command, "--use-cpu", cwd=place, input="What is fever?\n")
    assert done.returncode == 3, done.stderr
    assert "the weights of huge" in done.stderr and "GiB are free" in done.stderr
    assert "a smaller model" in done.stderr and "--force" in done.stderr and "Traceback" not in done.stderr
    forced = medgpt(*command, "--use-cpu", "--force", cwd=place, input="What is fever?\n")
    assert forced.returncode == 2 and "config.json and *.safetensors" in forced.stderr  # there are no weights
    assert not list(place.glob("no.json*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--device-memory", "24"), "--device-memory 24: not a size"),
        (("--throughput", "-3"), "--throughput -3"),
        (("--output-dir", "x"), "--output-dir"),
        (("--resume", "x"), "--resume"),
        (("--devices", "1"), "--devices 1"),
    ],
)
def test_what_is_refused(place: Path, more: tuple[str, ...], message: str) -> None:
    done = medgpt("plan", *stage(place, "sft", *more))
    assert done.returncode == 2 and message in done.stderr


def test_a_plan_takes_the_recipe_of_its_run(place: Path, sft_run: Path) -> None:
    done = medgpt("plan", "sft", "--recipe", sft_run / "recipe.yaml", "--throughput", 1000, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["updates"] == planned(place, "sft", "--epochs", 2)["updates"]
