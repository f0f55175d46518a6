"""`medgpt sft` as a user runs it: real processes, a tiny real model, real signals."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli import medgpt, start
from tests.tiny import tiny_model, write_jsonl

QUICK = ("--batch-size", "4", "--log-steps", "1", "--learning-rate", "0.01", "--eval-answer-tokens", "8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    tiny_model(folder / "model")
    words = ["diabetes", "leukemia", "hypertension", "感冒", "头痛", "fever", "糖尿病", "cough"]
    rows = [
        {"question": f"What are the symptoms of {word} {n}?", "answer": f"The symptoms include {word}."}
        for n in range(10)
        for word in words
    ]
    write_jsonl(folder / "train.jsonl", rows[:64])
    write_jsonl(folder / "dev.jsonl", rows[64:])
    return folder


def sft(place: Path, *more: object, **options):
    data = ("--base-model", "model", "--train-data", "train.jsonl", "--eval-data", "dev.jsonl", *QUICK)
    return medgpt("sft", *data, *more, cwd=place, **options)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter_model.safetensors")


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_paired(result: dict, names: tuple[str, ...]) -> None:
    """The paired differences are of the figures beside them, and lie in their intervals."""
    for name in names:
        change, before, after = (result[part][name] for part in ("change", "before", "after"))
        assert change["difference"] == pytest.approx(after - before, abs=1e-6), name
        if change["low"] is not None:
            assert change["low"] <= change["difference"] <= change["high"], name


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, dict]:
    """An uninterrupted run of two epochs with dropout."""
    done = sft(place, "--epochs", "2", "--save-steps", "5", "--output-dir", "whole", "--json")
    assert done.returncode == 0, done.stderr
    return place / "whole", json.loads(done.stdout)


def test_the_model_learns_and_the_run_folder_is_complete(whole) -> None:
    run, result = whole
    assert result["steps"] == 32
    assert result["after"]["loss"] < result["before"]["loss"] / 2
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "report.html", "checkpoints", "model"):
        assert (run / name).exists(), name
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["settings"]["epochs"] == {"value": 2.0, "origin": "flag"}
    assert manifest["data"]["training"]["used"] == 64
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "loss" in line] == list(range(1, 33))
    assert len(result["samples"]) == 3
    assert_paired(result, ("loss", "bits_per_byte"))
    assert result["change"]["loss"]["high"] < 0  # every question is answered better
    report = (run / "report.html").read_text()
    assert result["samples"][0]["question"] in report
    assert not list(run.rglob("*.bin"))


def test_the_result_is_an_ordinary_adapter(whole, place: Path) -> None:
    """PEFT and transformers alone load it, and see the held-out loss that the run reported."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, result = whole
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).resolve() == (place / "model").resolve()
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    total, count = 0.0, 0
    for line in (place / "dev.jsonl").read_text().splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        target = tokenizer.encode(row["answer"]) + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + target])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        count += len(target)
    assert result["after"]["tokens"] == count
    assert result["after"]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(whole, place: Path) -> None:
    process = start(
        *("sft", "--base-model", "model", "--train-data", "train.jsonl", "--eval-data", "dev.jsonl", *QUICK),
        *("--epochs", "2", "--save-steps", "5", "--output-dir", "killed"),
        cwd=place,
    )
    wait_for(place / "killed" / "checkpoints" / "checkpoint-20", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "killed" / "model").exists()
    # the newest checkpoint is torn, as by a full disk: the one before it must be taken
    newest = max((place / "killed" / "checkpoints").glob("checkpoint-*"), key=lambda one: int(one.name[11:]))
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    done = medgpt("sft", "--resume", "killed", cwd=place)
    assert done.returncode == 0, done.stderr
    assert newest.name in done.stderr  # it says what it left out
    assert_same(weights(place / "killed"), weights(whole[0]))
    resumed = json.loads((place / "killed" / "run.json").read_text())["result"]
    assert resumed["change"] == whole[1]["change"]  # what was measured before the kill is compared with
    steps = [
        json.loads(line)["step"] for line in (place / "killed" / "metrics.jsonl").open() if '"loss"' in line
    ]
    assert steps == list(range(1, 33))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_weights(whole, place: Path, number, code) -> None:
    name = f"stopped-{code}"
    process = start(
        *("sft", "--base-model", "model", "--train-data", "train.jsonl", "--eval-data", "dev.jsonl", *QUICK),
        *("--epochs", "2", "--save-steps", "100", "--eval-steps", "100", "--output-dir", name),
        cwd=place,
    )
    wait_for(place / name / "metrics.jsonl", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert f"medgpt sft --resume {name}" in said
    assert "Traceback" not in said
    assert json.loads((place / name / "run.json").read_text())["status"] == "stopped"
    done = medgpt("sft", "--resume", name, cwd=place)
    assert done.returncode == 0, done.stderr
    assert_same(weights(place / name), weights(whole[0]))


def test_a_resume_with_other_settings_or_data_is_refused(place: Path) -> None:
    data = place / "own.jsonl"
    data.write_text((place / "train.jsonl").read_text())
    process = start(
        *("sft", "--base-model", "model", "--train-data", "own.jsonl", *QUICK, "--epochs", "30"),
        *("--save-steps", "2", "--output-dir", "changed"),
        cwd=place,
    )
    wait_for(place / "changed" / "checkpoints" / "checkpoint-2", process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    other = medgpt("sft", "--resume", "changed", "--lora-rank", "4", cwd=place)
    assert other.returncode == 2
    assert "--lora-rank 8 → 4" in other.stderr
    with data.open("a") as file:
        file.write('{"question": "One more?", "answer": "Yes."}\n')
    changed = medgpt("sft", "--resume", "changed", cwd=place)
    assert changed.returncode == 2
    assert "training" in changed.stderr and "changed" in changed.stderr


def test_a_finished_folder_is_never_overwritten(whole, place: Path) -> None:
    run, _ = whole
    before = weights(run)
    assert sft(place, "--output-dir", "whole").returncode == 2
    assert medgpt("sft", "--resume", "whole", cwd=place).returncode == 2
    assert_same(before, weights(run))


def test_a_recipe_repeats_a_run(whole, place: Path) -> None:
    done = medgpt("sft", "--recipe", "whole/recipe.yaml", "--output-dir", "again", cwd=place)
    assert done.returncode == 0, done.stderr
    assert_same(weights(place / "again"), weights(whole[0]))


def test_tuning_on_top_of_an_adapter_keeps_what_it_knew(whole, place: Path) -> None:
    _, first = whole
    data = ("--train-data", "train.jsonl", "--eval-data", "dev.jsonl", *QUICK, "--max-steps", "2")
    done = medgpt("sft", "--lora-model", "whole", *data, "--output-dir", "on-top", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    second = json.loads(done.stdout)
    assert second["before"]["loss"] == pytest.approx(first["after"]["loss"], abs=1e-4)
    config = json.loads((place / "on-top" / "model" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).resolve() == (place / "model").resolve()


def test_full_tuning_writes_an_ordinary_model(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = sft(place, "--tuning", "full", "--max-steps", "10", "--output-dir", "full", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["after"]["loss"] < result["before"]["loss"]
    tuned = AutoModelForCausalLM.from_pretrained(place / "full" / "model")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    moved = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True)]
    assert all(moved)


def test_early_stopping_keeps_the_best_weights(place: Path) -> None:
    """The held-out answers contradict the training ones, so learning soon makes the held-out loss worse."""
    rows = [json.loads(line) for line in (place / "dev.jsonl").open()]
    write_jsonl(
        place / "contrary.jsonl", [{**row, "answer": "不建议饮酒，酒精会影响血压控制。"} for row in rows]
    )
    done = medgpt(
        *("sft", "--base-model", "model", "--train-data", "train.jsonl", "--eval-data", "contrary.jsonl"),
        *(
            *QUICK,
            "--epochs",
            "20",
            "--eval-steps",
            "2",
            "--early-stopping",
            "2",
            "--output-dir",
            "early",
            "--json",
        ),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    lines = [json.loads(line) for line in (place / "early" / "metrics.jsonl").open()]
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert result["steps"] < 320
    assert result["after"]["loss"] == pytest.approx(min(measured), abs=1e-4)
    assert measured[-1] > min(measured)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_what_must_not_change_the_loss_curve(place: Path) -> None:
    """Accumulating two batches of 2 is a batch of 4, normalised by target tokens; recomputing is exact."""
    common = ("--max-steps", "6", "--lora-dropout", "0", "--batch-order", "shuffled", "--eval-questions", "0")
    curves = {}
    for name, flags in {
        "plain": ("--batch-size", "4"),
        "accumulated": ("--batch-size", "2", "--gradient-accumulation", "2"),
        "recomputed": ("--batch-size", "4", "--gradient-checkpointing"),
        "padded": ("--batch-size", "4", "--layout", "padded"),
    }.items():
        done = sft(place, *common, *flags, "--output-dir", f"same-{name}")
        assert done.returncode == 0, done.stderr
        curves[name] = losses(place / f"same-{name}")
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["plain"], abs=1e-4), name
    assert curves["plain"][-1] < curves["plain"][0]


def test_what_must_change_it(place: Path) -> None:
    common = ("--max-steps", "4", "--lora-dropout", "0", "--eval-questions", "0")
    plain = None
    for number, flags in enumerate(
        [
            (),
            ("--neftune-alpha", "5"),
            ("--seed", "7"),
            ("--schedule", "constant", "--warmup-ratio", "0"),
            ("--rslora",),
        ]
    ):
        done = sft(place, *common, *flags, "--output-dir", f"other-{number}")
        assert done.returncode == 0, done.stderr
        curve = losses(place / f"other-{number}")
        plain = curve if plain is None else plain
        assert not flags or curve[1:] != pytest.approx(plain[1:], abs=1e-6), flags


def test_a_device_or_tracker_that_is_missing_is_said_first(place: Path) -> None:
    for flags in (("--gpus", "7"), ("--report-to", "nosuchtracker")):
        done = sft(place, *flags, "--output-dir", "nothing")
        assert done.returncode == 3, done.stderr
        assert " ".join(flags) in done.stderr
        assert not (place / "nothing").exists()


def test_a_loss_that_is_no_number_ends_with_code_5(place: Path) -> None:
    done = sft(
        place, "--tuning", "full", "--learning-rate", "1e30", "--output-dir", "nan", "--max-grad-norm", "1e30"
    )
    assert done.returncode == 5, done.stderr
    assert "--learning-rate" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((place / "nan" / "run.json").read_text())["status"] == "failed"


def wait_for(path: Path, process) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)
