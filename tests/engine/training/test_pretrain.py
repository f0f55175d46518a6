"""`medgpt pretrain` as a user runs it: real processes, a tiny real model, real signals."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.bits_per_byte_reference import bits_per_byte
from tests.cli import medgpt, start
from tests.engine.training.test_sft import assert_paired, assert_same, wait_for, weights
from tests.tiny import tiny_model, write_jsonl

QUICK = ("--block-size", "32", "--batch-size", "4", "--learning-rate", "0.01")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    tiny_model(folder / "model")
    tiny_model(folder / "llama3", "llama3")
    zh = [f"糖尿病需要控制总热量，第{n}次复查。高血压患者不建议饮酒。" for n in range(40)]
    en = [f"The symptoms of diabetes include thirst and weight loss, case {n}." for n in range(40)]
    write_jsonl(folder / "zh.jsonl", [{"text": text} for text in zh])
    write_jsonl(folder / "valid.jsonl", [{"text": text.replace("第", "又")} for text in zh[:5] + en[:5]])
    (folder / "en.txt").write_text("\n\n".join(text.replace(", ", ",\n") for text in en), encoding="utf-8")
    return folder


def pretrain(place: Path, *more: object, **options):
    env = {"MEDGPT_HOME": str(place / "home")}
    data = ("--base-model", "model", "--train-data", "zh.jsonl", *QUICK)
    return medgpt("pretrain", *data, *more, cwd=place, env=env, **options)


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, dict]:
    done = pretrain(
        place,
        *("--train-data", "en.txt", "--eval-data", "valid.jsonl", "--epochs", "3", "--save-steps", "5"),
        *("--output-dir", "whole", "--json"),
    )
    assert done.returncode == 0, done.stderr
    return place / "whole", json.loads(done.stdout)


def test_learns_and_tells_bits_per_byte_by_source_and_language(whole, place: Path) -> None:
    run, result = whole
    before, after = result["before"], result["after"]
    assert after["bits_per_byte"] < before["bits_per_byte"] / 2
    assert_paired(result, ("loss", "bits_per_byte"))
    for part, old, new in zip(result["change"]["parts"], before["parts"], after["parts"], strict=True):
        expected = new["bits_per_byte"] - old["bits_per_byte"]
        assert part["language"] == new["language"]
        assert part["bits_per_byte"]["difference"] == pytest.approx(expected, abs=1e-6)
        assert part["bits_per_byte"]["high"] < 0
    assert [(one["source"], one["language"]) for one in after["parts"]] == [
        ("valid.jsonl", "en"),
        ("valid.jsonl", "zh"),
    ]
    assert sum(one["bytes"] for one in after["parts"]) == after["bytes"]
    texts = [json.loads(line)["text"] for line in (place / "valid.jsonl").read_text().splitlines()]
    assert after["bytes"] == sum(len(text.encode()) for text in texts)
    data = json.loads((run / "run.json").read_text())["data"]
    assert data["training"]["formats"]["en.txt"] == "text, a document a block"
    assert [(one["source"], one["documents"]) for one in data["sources"]] == [
        ("zh.jsonl", 40),
        ("en.txt", 35),
    ]
    # five of the English texts are held out, though their lines are broken elsewhere
    assert data["training"]["skipped"] == {"stands in the held-out data": 5}
    report = (run / "report.html").read_text()
    assert "valid.jsonl" in report and f"{after['parts'][0]['bits_per_byte']:.4f}" in report


@pytest.mark.parametrize("when", ["before", "after"])
def test_figures_equal_plain_transformers(whole, place: Path, when: str) -> None:
    run, result = whole
    adapter = str(run / "model") if when == "after" else None
    found = bits_per_byte(str(place / "model"), adapter, str(place / "valid.jsonl"), 32, "<|endoftext|>")
    assert result[when]["bits_per_byte"] == pytest.approx(found["bits_per_byte"], abs=1e-5)
    assert result[when]["tokens"] == found["tokens"]


def test_bits_per_byte_do_not_depend_on_layout_or_batch(whole, place: Path) -> None:
    _, result = whole
    done = pretrain(
        place,
        *("--train-data", "en.txt", "--eval-data", "valid.jsonl", "--max-steps", "1"),
        *("--batch-size", "3", "--neftune-alpha", "5", "--output-dir", "padded", "--json"),
    )
    assert done.returncode == 0, done.stderr
    padded = json.loads(done.stdout)["before"]
    assert padded["bits_per_byte"] == pytest.approx(result["before"]["bits_per_byte"], abs=1e-5)


def test_a_killed_run_goes_on_to_the_same_weights(whole, place: Path) -> None:
    process = start(
        *("pretrain", "--base-model", "model", "--train-data", "zh.jsonl", *QUICK, "--train-data", "en.txt"),
        *("--eval-data", "valid.jsonl", "--epochs", "3", "--save-steps", "5", "--output-dir", "killed"),
        cwd=place,
        env={"MEDGPT_HOME": str(place / "home2")},
    )
    wait_for(place / "killed" / "checkpoints" / "checkpoint-15", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(place / "home2")  # the token files are made again, the same
    done = medgpt("pretrain", "--resume", "killed", cwd=place, env={"MEDGPT_HOME": str(place / "home2")})
    assert done.returncode == 0, done.stderr
    assert_same(weights(place / "killed"), weights(whole[0]))


def test_resume_refuses_changed_text(place: Path) -> None:
    write_jsonl(place / "own.jsonl", [{"text": f"text number {n} of a ward"} for n in range(20)])
    process = start(
        *("pretrain", "--base-model", "model", "--train-data", "own.jsonl", *QUICK, "--epochs", "50"),
        *("--save-steps", "5", "--output-dir", "changed"),
        cwd=place,
        env={"MEDGPT_HOME": str(place / "home")},
    )
    wait_for(place / "changed" / "checkpoints" / "checkpoint-5", process)
    process.kill()
    process.wait()
    write_jsonl(place / "own.jsonl", [{"text": f"text number {n} of the ward"} for n in range(20)])
    done = medgpt("pretrain", "--resume", "changed", cwd=place, env={"MEDGPT_HOME": str(place / "home")})
    assert done.returncode == 2
    assert "changed since it began" in done.stderr and "Traceback" not in done.stderr


def test_a_new_model_from_a_config(place: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    runs = []
    for name in ("new1", "new2"):
        done = medgpt(
            *(
                "pretrain",
                "--from-config",
                "config.json",
                "--tokenizer-path",
                "model",
                "--train-data",
                "zh.jsonl",
            ),
            *("--block-size", "32", "--epochs", "3", "--output-dir", name, "--json"),
            cwd=place,
            env={"MEDGPT_HOME": str(place / "home")},
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    assert runs[0]["after"] == runs[1]["after"]  # the seed decides about the random weights
    assert runs[0]["after"]["bits_per_byte"] < runs[0]["before"]["bits_per_byte"]
    tokenizer = AutoTokenizer.from_pretrained(place / "new1" / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "new1" / "model")
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0 and len(tokenizer) <= rows < len(tokenizer) + 64
    assert json.loads((place / "new1" / "run.json").read_text())["settings"]["tuning"]["value"] == "full"


def test_weights_and_replay_are_shown_and_kept(place: Path) -> None:
    done = pretrain(
        place,
        *("--train-data", "en.txt:0.25", "--replay-data", "valid.jsonl", "--replay-share", "0.2"),
        *("--dry-run", "--json"),
    )
    assert done.returncode == 2 and "zh.jsonl has no weight" in done.stderr
    done = medgpt(
        *(
            "pretrain",
            "--base-model",
            "model",
            "--train-data",
            "zh.jsonl:0.75",
            "--train-data",
            "en.txt:0.25",
        ),
        *("--replay-data", "valid.jsonl", "--replay-share", "0.2", *QUICK, "--epochs", "2"),
        *("--dry-run", "--json"),
        cwd=place,
        env={"MEDGPT_HOME": str(place / "nothing")},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    zh, en, replay = found["data"]["sources"]
    assert replay["replay"] and replay["share"] == pytest.approx(0.2, abs=0.02)
    assert zh["share"] / en["share"] == pytest.approx(3, rel=0.1)
    assert found["plan"]["passes over zh.jsonl"] == pytest.approx(2 * zh["passes_an_epoch"])
    assert not (place / "nothing").exists()  # a dry run writes nothing


def test_a_dry_run_shows_the_mix(place: Path) -> None:
    done = pretrain(place, "--train-data", "en.txt", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "passes over en.txt" in done.stdout and "length in tokens" in done.stdout
    assert "a document a block" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--train-data", "missing.jsonl"), "no such file"),
        (("--replay-share", "0.5"), "--replay-share needs --replay-data"),
        (("--embeddings", "new"), "--embeddings new"),
        (("--replay-data", "en.txt:0.5"), "--replay-data en.txt:0.5: a replay source has no weight"),
        (("--embeddings", "all", "--tuning", "full"), "--embeddings is about an adapter"),
        (("--tuning", "full", "--lora-rank", "8"), "--lora-rank is about an adapter"),
        (("--text-unit", "line"), "--text-unit line: zh.jsonl has its documents as records"),
        (("--text-unit", "chapter"), "--text-unit chapter"),
        (("--block-size", "4"), "--block-size"),
        (("--train-data", "zh.jsonl"), "named twice"),
    ],
)
def test_wrong_settings(place: Path, arguments, word) -> None:
    done = pretrain(place, *arguments, "--output-dir", "never")
    assert done.returncode == 2, done.stderr
    assert word in done.stderr and "hint:" in done.stderr and "Traceback" not in done.stderr


def test_a_runs_own_recipe_runs_again(whole, place: Path) -> None:
    """It spells every default out, also of options that go with others that were not given."""
    again = ("--recipe", "whole/recipe.yaml", "--output-dir", "again", "--max-steps", "2", "--json")
    done = medgpt("pretrain", *again, cwd=place, env={"MEDGPT_HOME": str(place / "home")})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["before"] == whole[1]["before"]


def test_what_is_held_out_is_not_counted_as_used(place: Path) -> None:
    done = pretrain(place, "--eval-fraction", "0.25", "--dry-run", "--json")
    data = json.loads(done.stdout)["data"]
    assert data["training"]["read"] == data["training"]["used"] == data["training"]["documents"] == 30
    assert data["held_out"]["read"] == data["held_out"]["used"] == 10


def test_held_out_text_is_not_trained_on(place: Path) -> None:
    rows = [json.loads(line) for line in (place / "zh.jsonl").read_text().splitlines()]
    write_jsonl(place / "overlap.jsonl", rows[:3])
    done = pretrain(place, "--eval-data", "overlap.jsonl", "--dry-run", "--json")
    training = json.loads(done.stdout)["data"]["training"]
    assert training["skipped"] == {"stands in the held-out data": 3}
    assert training["documents"] == 37


@pytest.mark.parametrize(("which", "tied"), [("new", True), ("all", False)])
def test_adapters_carry_their_embeddings(place: Path, tmp_path: Path, which: str, tied: bool) -> None:
    """Trained on a widened base: the adapter brings its rows, merging keeps them, another base is refused."""
    base = tmp_path / "base"
    shutil.copytree(place / "model", base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.9)
    model.save_pretrained(base)
    home = {"MEDGPT_HOME": str(place / "home")}
    made = medgpt(
        *("vocabulary", "--base-model", base, "--train-data", place / "zh.jsonl", "--size", "200"),
        *("--output-dir", tmp_path / "wide"),
        env=home,
    )
    assert made.returncode == 0, made.stderr
    record = json.loads((tmp_path / "wide" / "vocabulary.json").read_text())
    first = record["first_new_id"]
    data = ("--train-data", place / "zh.jsonl", *QUICK, "--max-steps", "8", "--embeddings", which)
    done = medgpt(
        "pretrain", "--base-model", tmp_path / "wide", *data, "--output-dir", tmp_path / "run", env=home
    )
    assert done.returncode == 0, done.stderr
    adapter = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    size = sum(weight.numel() for name, weight in adapter.items() if "lora" not in name)
    added = len(record["new_tokens"]) + record["intermediate"]
    rows = record["rows"] if which == "all" else added
    # PEFT writes a tied table twice when all of it learns
    assert size == rows * 64 * (1 if tied and which == "new" else 2)

    merged = medgpt(
        "merge-lora",
        "--lora-model",
        tmp_path / "run",
        "--output-dir",
        tmp_path / "merged",
        "--json",
        env=home,
    )
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["in_memory"] < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    moved = (plain.get_input_embeddings().weight != wide.get_input_embeddings().weight).any(dim=1)
    assert moved[first : first + added].any()
    assert moved[:first].any() == (which == "all")
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == tied

    (tmp_path / "in.txt").write_text("糖尿病需要忌口吗？\n", encoding="utf-8")
    ask = ("--data-file", tmp_path / "in.txt", "--predictions-file", "-", "--max-new-tokens", "8")
    from_run = medgpt("infer", "--lora-model", tmp_path / "run", *ask, env=home)
    from_merged = medgpt("infer", "--base-model", tmp_path / "merged", *ask, env=home)
    assert from_run.returncode == from_merged.returncode == 0, from_run.stderr
    assert json.loads(from_run.stdout)["output"] == json.loads(from_merged.stdout)["output"]
    refused = medgpt("infer", "--base-model", base, "--lora-model", tmp_path / "run", *ask, env=home)
    assert refused.returncode == 2
    assert "widened vocabulary" in refused.stderr and "Traceback" not in refused.stderr


def test_an_adapter_that_brings_resized_tables_restores_the_size(place: Path, tmp_path: Path) -> None:
    """As other tools make them: the base resized in memory, the whole tables in the adapter."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.add_tokens(["糖尿病", "高血压"])
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["embed_tokens"]
    )
    config.ensure_weight_tying = True
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = tokenizer("糖尿病和高血压", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = wrapped.eval()(ids).logits
    from medicalgpt_cli.engine.model.loading import load_model
    from medicalgpt_cli.engine.model.references import resolve_models
    from medicalgpt_cli.settings.groups import ModelSettings

    settings = ModelSettings(
        base_model=str(place / "model"), lora_model=str(tmp_path / "adapter"), use_cpu=True
    )
    loaded = load_model(settings, resolve_models(settings))
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)


def test_sft_goes_on_from_a_pretrained_adapter(whole, place: Path) -> None:
    write_jsonl(place / "qa.jsonl", [{"question": f"问{n}", "answer": "多饮水。"} for n in range(12)])
    done = medgpt(
        *(
            "sft",
            "--lora-model",
            "whole",
            "--train-data",
            "qa.jsonl",
            "--max-steps",
            "3",
            "--output-dir",
            "tuned",
        ),
        *("--learning-rate", "0.01", "--eval-answer-tokens", "4", "--json"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["after"]["loss"] < result["before"]["loss"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(place: Path, tmp_path: Path) -> None:
    """300 MB of text within 10 % of the memory of 30 MB."""
    peaks = {}
    line = (
        json.dumps({"text": "The patient was seen in the ward, and the findings were as follows. " * 40})
        + "\n"
    )
    for megabytes in (30, 300):
        file = tmp_path / f"{megabytes}.jsonl"
        with file.open("w") as out:
            for number in range(megabytes * 10**6 // (len(line) + 8)):
                out.write(line.replace("ward", f"ward {number}", 1))
        process = start(
            *("pretrain", "--base-model", place / "model", "--train-data", file, "--block-size", "512"),
            *("--max-steps", "30", "--eval-tokens", "5000", "--output-dir", tmp_path / f"run{megabytes}"),
            env={"MEDGPT_HOME": str(tmp_path / f"home{megabytes}")},
        )
        peaks[megabytes] = peak_of(process)
        shutil.rmtree(tmp_path / f"home{megabytes}")
    print(f"peak resident memory: {peaks[30]:.0f} MB with 30 MB of text, {peaks[300]:.0f} MB with 300 MB")
    assert peaks[300] <= 1.1 * peaks[30]


def peak_of(process) -> float:
    """Largest resident memory of a process until it ends well, in MB."""
    import os

    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.stderr.read()
    return usage.ru_maxrss / 1024
