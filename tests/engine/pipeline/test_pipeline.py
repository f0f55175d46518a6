"""Pipelines on a tiny model: the steps are the real commands."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from medicalgpt_cli.commands.pipeline import prepare, run_pipeline
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.pipeline.recipe import read_pipeline
from medicalgpt_cli.engine.pipeline.run import check
from medicalgpt_cli.errors import MedgptError, UsageError
from tests.cli import start
from tests.tiny import tiny_model, write_jsonl

QUICK = {"batch-size": 2, "max-steps": 4, "save-steps": 1, "learning-rate": 0.01}


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "model")
    rows = [{"question": f"What helps against pain {n}?", "answer": f"Rest {n}."} for n in range(12)]
    write_jsonl(tmp_path / "talk.jsonl", rows)
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"Rest helps against pain {n}. " * 4} for n in range(12)])
    (tmp_path / "ask.txt").write_text("What helps?\nWhat is pain?\n", encoding="utf-8")
    return tmp_path


def written(place: Path, **changes) -> Path:
    """pretrain → sft → merge-lora → infer, and the base's own answers."""
    steps = {
        "pretrain": {"base-model": "model", "train-data": ["text.jsonl"], "block-size": 32, **QUICK},
        "sft": {"lora-model": "${pretrain}", "train-data": ["talk.jsonl"], "eval-answer-tokens": 4, **QUICK},
        "merge-lora": {"lora-model": "${sft}"},
        "before": {"command": "infer", "base-model": "model", "data-file": "ask.txt", "max-new-tokens": 4},
        "after": {
            "command": "infer",
            "base-model": "${merge-lora}",
            "data-file": "ask.txt",
            "max-new-tokens": 4,
        },
    }
    for name, values in changes.items():
        steps[name] = {**steps.get(name, {}), **values}
    path = place / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"output-dir": "out", "steps": steps}, sort_keys=False), encoding="utf-8")
    return path


def run(path: Path) -> dict:
    return run_pipeline(read_pipeline(path), Path("out"), "medgpt pipeline …", Observer(), show=False)


def test_steps_build_on_each_other_and_what_is_done_is_not_done_again(place: Path, capsys) -> None:
    first = run(written(place))
    assert capsys.readouterr().out == ""  # a step prints no result: with --json there is one object
    assert (first["done"], first["unchanged"]) == (5, 0)
    parents = json.loads((place / "out/sft/run.json").read_text())["parents"]
    assert parents["adapter"]["name"] == "out/pretrain"
    assert {one["step"] for one in first["figures"]} == {"pretrain", "sft"}
    page = (place / "out/report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 0
    for shown in ("What is pain?", "Lineage", "bits per byte", "<b>before</b>", "<b>after</b>"):
        assert shown in page
    weights = (place / "out/merge-lora/model.safetensors").read_bytes()

    second = run(written(place))
    assert (second["done"], second["unchanged"]) == (0, 5)

    # Another setting of sft: sft and what builds on it are done again, into new folders.
    third = run(written(place, sft={"max-steps": 3}))
    assert (third["done"], third["unchanged"]) == (3, 2)
    assert third["steps"]["sft"] == "out/sft-2" and third["steps"]["pretrain"] == "out/pretrain"
    assert (place / "out/merge-lora/model.safetensors").read_bytes() == weights

    # Other data under the same name.
    (place / "ask.txt").write_text("What else?\n", encoding="utf-8")
    fourth = run(written(place, sft={"max-steps": 3}))
    assert (fourth["done"], fourth["unchanged"]) == (2, 3)


def test_a_step_whose_result_has_changed_since_is_done_again(place: Path) -> None:
    first = run(written(place))
    weights = place / "out/merge-lora/model.safetensors"
    before = weights.read_bytes()
    content = bytearray(before)
    content[-1] ^= 1
    weights.write_bytes(content)
    second = run(written(place))
    assert (second["done"], second["unchanged"]) == (1, 4)
    assert second["steps"]["merge-lora"] == "out/merge-lora-2"  # what was changed is kept
    assert (place / "out/merge-lora-2/model.safetensors").read_bytes() == before
    assert {**second["steps"], "merge-lora": ""} == {**first["steps"], "merge-lora": ""}


def test_the_kept_recipe_of_a_step_is_the_command_alone(place: Path) -> None:
    run(written(place))
    values = yaml.safe_load((place / "out/recipes/sft.yaml").read_text(encoding="utf-8"))
    prepare("sft", {**values, "output-dir": "alone"})(Observer())
    one, two = (load_file(place / run / "model/adapter_model.safetensors") for run in ("out/sft", "alone"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_failure_names_the_step_and_what_is_done_stays(place: Path) -> None:
    (place / "ask.txt").unlink()
    with pytest.raises(MedgptError, match="step before: ") as caught:
        run(written(place))
    assert caught.value.exit_code == 2 and caught.value.hint.endswith("go on with: medgpt pipeline …")
    (place / "ask.txt").write_text("What helps?\n", encoding="utf-8")
    went_on = run(written(place))
    assert (went_on["done"], went_on["unchanged"]) == (2, 3)


def test_killed_and_run_again_leaves_the_same_weights(place: Path) -> None:
    path = written(place, sft={"max-steps": 40}, pretrain={"max-steps": 10})
    whole = run_pipeline(read_pipeline(path), Path("whole"), "", Observer(), show=False)
    process = start("pipeline", "--recipe", path, cwd=place)
    while process.poll() is None and not (place / "out/sft/checkpoints/checkpoint-5/complete.json").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert json.loads((place / "out/sft/run.json").read_text())["status"] == "running"
    went_on = run(path)
    assert (went_on["done"], went_on["unchanged"]) == (4, 1)
    assert json.loads((place / "out/sft/run.json").read_text())["resumed"]
    one, two = (load_file(place / run / "merge-lora/model.safetensors") for run in ("out", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    shown = [[figure["after"] for figure in result["figures"]] for result in (went_on, whole)]
    assert shown[0] == shown[1]


def test_mistakes_are_found_before_anything_runs(place: Path) -> None:
    for changes, words in (
        ({"sft": {"batch-size": "many"}}, "step sft: .*batch-size"),
        ({"sft": {"lerning-rate": 1}}, "step sft: .*lerning-rate"),
        ({"sft": {"tuning": "lorra"}}, "step sft: .*lorra"),
        ({"sft": {"output-dir": "x"}}, "step sft: output-dir is the pipeline's"),
        ({"sft": {"lora-model": "${rl}"}}, r"\$\{rl\} is no earlier step"),
        ({"chat": {"base-model": "model"}}, "chat is no command of a pipeline"),
        ({"my step": {"command": "sft"}}, "not a name for a step"),
    ):
        with pytest.raises(UsageError, match=words):
            check(read_pipeline(written(place, **changes)), Path("out"), prepare)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "steps: []", "- sft", "steps:\n  sft:", "step:\n  sft: {}", "a: [", "\x00"]
)
def test_what_is_no_pipeline_is_refused(place: Path, text: str) -> None:
    (place / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError):
        read_pipeline(place / "bad.yaml")


def test_the_recipe_that_ships_is_sound() -> None:
    import medicalgpt_cli

    path = Path(medicalgpt_cli.__file__).parent / "recipes" / "quickstart.yaml"
    steps = check(read_pipeline(path), Path("never-made"), prepare)["steps"]
    assert list(steps)[:5] == ["pretrain", "sft", "reward", "rl", "merge-lora"]
