"""A run that died late goes on to the bytes of one that did not, and goes on with nothing that has changed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli import medgpt
from tests.engine.training.several import STAGES, make_place

# 4 updates, within an epoch: the library would not notice by itself that they were made.
SHORT = (
    *("--max-steps", "4", "--batch-size", "4", "--learning-rate", "0.01", "--schedule", "constant"),
    *("--save-steps", "2", "--use-cpu"),
)
PUBLISHED = "medicalgpt_cli.engine.run.folder:RunFolder.publish_model"
DONE = "medicalgpt_cli.engine.run.folder:RunFolder.finish"
NAMES = ("adapter_model.safetensors", "model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("resume"))


def train(place: Path, stage: str, run: str, *more: object, **options):
    return medgpt(
        *(stage, "--base-model", "model", *STAGES[stage], *SHORT, "--output-dir", run, *more),
        cwd=place,
        **options,
    )


def resumed(place: Path, stage: str, run: str, *more: object) -> dict:
    done = medgpt(stage, "--resume", run, "--json", *more, cwd=place)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def weights(run: Path) -> bytes:
    return next((run / "model" / name).read_bytes() for name in NAMES if (run / "model" / name).is_file())


def figures(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock has measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.endswith(("seconds", "_per_second"))}
        for line in lines
    ]


def as_it_died(run: Path, name: str) -> Path:
    """A copy of a finished run as it stood before its model was published."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    (copy / "report.html").unlink()
    manifest = json.loads((copy / "run.json").read_text())
    del manifest["result"]
    (copy / "run.json").write_text(json.dumps({**manifest, "status": "running", "finished": None}))
    return copy


def assert_as_if_nothing_had_happened(run: Path, whole: Path, result: dict) -> None:
    before = json.loads((whole / "run.json").read_text())["result"]
    assert result["steps"] == before["steps"]
    assert result["after"] == before["after"]
    assert weights(run) == weights(whole)
    assert figures(run) == figures(whole)
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert (run / "report.html").is_file()


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run of sft that nothing has interrupted."""
    done = train(place, "sft", "whole")
    assert done.returncode == 0, done.stderr
    return place / "whole"


@pytest.mark.parametrize("where", [PUBLISHED, DONE])
def test_a_run_killed_behind_its_last_update_makes_no_other_one(place: Path, whole: Path, where: str) -> None:
    name = f"killed-{where.rpartition('.')[2]}"
    assert train(place, "sft", name, signal_in=(where, signal.SIGKILL)).returncode == -9
    assert (place / name / "model").exists() == (where == DONE)
    assert (place / name / "checkpoints" / "checkpoint-4").is_dir()
    assert_as_if_nothing_had_happened(place / name, whole, resumed(place, "sft", name))


SLOW = pytest.mark.slow
CASES = [
    pytest.param("pretrain", "full"),
    pytest.param("reward", "lora"),
    pytest.param("rl", "lora"),
    pytest.param("pretrain", "lora", marks=SLOW),
    pytest.param("sft", "full", marks=SLOW),
    pytest.param("reward", "full", marks=SLOW),
]


@pytest.mark.parametrize(("stage", "tuning"), CASES)
def test_every_stage_publishes_what_was_trained_to_the_end(place: Path, stage: str, tuning: str) -> None:
    done = train(place, stage, f"{stage}-{tuning}", "--tuning", tuning)
    assert done.returncode == 0, done.stderr
    run = as_it_died(place / f"{stage}-{tuning}", f"{stage}-{tuning}-died")
    assert_as_if_nothing_had_happened(run, place / f"{stage}-{tuning}", resumed(place, stage, run.name))


def test_a_run_that_early_stopping_ended_is_not_trained_on(place: Path) -> None:
    """It died with the last measurement saved and the best checkpoint chosen."""
    more = ("--eval-fraction", "0.2", "--eval-steps", "1", "--save-steps", "1", "--early-stopping", "1")
    more += ("--max-steps", "30", "--learning-rate", "0.1")
    done = train(place, "sft", "early", *more)
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "early" / "run.json").read_text())["result"]["steps"] < 30
    run = as_it_died(place / "early", "early-died")
    assert_as_if_nothing_had_happened(run, place / "early", resumed(place, "sft", run.name))


@pytest.mark.parametrize("steps", ["3", "1"])
def test_a_measurement_that_a_signal_has_skipped_is_made_up_for(place: Path, steps: str) -> None:
    """Whoever stops a run wants it to stop at once; early stopping has to know of that update all the same."""
    more = ("--eval-fraction", "0.2", "--eval-steps", "1", "--early-stopping", "5", "--max-steps", steps)
    done = train(place, "sft", f"all-{steps}", *more)
    assert done.returncode == 0, done.stderr
    learning = ("medicalgpt_cli.engine.training.trainer:target_loss", signal.SIGTERM)
    assert train(place, "sft", f"stopped-{steps}", *more, signal_in=learning).returncode == 143
    assert [line["step"] for line in figures(place / f"stopped-{steps}")] == [1]
    result = resumed(place, "sft", f"stopped-{steps}")
    assert_as_if_nothing_had_happened(place / f"stopped-{steps}", place / f"all-{steps}", result)


# -- what may not have changed ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(place: Path, whole: Path) -> Path:
    """A run of rl on everything that a run can be built on, as it stood before its model was published."""
    done = train(place, "rl", "rl", "--base-model", "model", "--lora-model", "whole")
    assert done.returncode == 0, done.stderr
    return as_it_died(place / "rl", "built")


def nudge(file: Path) -> None:
    """One number of one weight."""
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})


def put(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


# What is changed, in which file, how, and what the refusal names; nothing is refused where nothing is named.
CHANGES = {
    "nothing": (None, None, None),
    "base weights": ("model/model.safetensors", nudge, "base: model.safetensors changed"),
    "base config": (
        "model/config.json",
        lambda file: put(file, rms_norm_eps=0.01),
        "base: config.json changed",
    ),
    "adapter": (
        "whole/model/adapter_model.safetensors",
        nudge,
        "adapter: adapter_model.safetensors changed",
    ),
    "reward model": (
        "rm/model/adapter_model.safetensors",
        nudge,
        "the reward model's adapter: adapter_model.safetensors changed",
    ),
    "data": ("prompts.jsonl", lambda file: append(file, '{"prompt": "New?"}\n'), "training"),
    "template": ("whole/model/chat_template.jinja", lambda file: append(file, " "), "template"),
    "settings": (None, None, "--learning-rate 0.01 → 0.02"),
}


@contextmanager
def changed(file: Path | None, change) -> Iterator[None]:
    """A file of the place, otherwise for a while; its times tell."""
    if file is None:
        yield
        return
    before = file.read_bytes()
    try:
        change(file)
        yield
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_goes_on_with_nothing_that_has_changed(place: Path, built: Path, what: str) -> None:
    """The table of what a resume refuses: `pytest -v -k goes_on_with_nothing`."""
    name, change, word = CHANGES[what]
    run = place / f"built-{what.replace(' ', '-')}"
    shutil.copytree(built, run)
    more = ("--learning-rate", "0.02") if what == "settings" else ()
    with changed(place / name if name else None, change):
        done = medgpt("rl", "--resume", run.name, "--json", *more, cwd=place)
    said = " ".join(done.stderr.split())
    if word is None:
        assert done.returncode == 0, said
        assert_as_if_nothing_had_happened(run, place / "rl", json.loads(done.stdout))
    else:
        assert done.returncode == 2, said
        assert word in said
        assert not (run / "model").exists()


def test_a_copy_of_the_base_in_other_files_can_be_accepted(place: Path, built: Path) -> None:
    from transformers import AutoModelForCausalLM

    run, base = place / "built-resharded", place / "model"
    shutil.copytree(built, run)
    whole = (base / "model.safetensors").read_bytes()
    try:
        model = AutoModelForCausalLM.from_pretrained(base)
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size="200KB")
        assert medgpt("rl", "--resume", run.name, cwd=place).returncode == 2
        result = resumed(place, "rl", run.name, "--accept-other-base")
        assert_as_if_nothing_had_happened(run, place / "rl", result)
    finally:
        for file in base.glob("model*.safetensors*"):
            file.unlink()
        (base / "model.safetensors").write_bytes(whole)
    [accepted] = json.loads((run / "run.json").read_text())["accepted_other_base"]
    assert accepted["base"][0] == "model.safetensors is missing"
    assert accepted["reward_model_base"] == accepted["base"]


@pytest.mark.slow
def test_two_processes_publish_what_was_trained_to_the_end(place: Path) -> None:
    done = train(place, "sft", "two", "--processes", "2", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    run = as_it_died(place / "two", "two-died")
    assert_as_if_nothing_had_happened(run, place / "two", resumed(place, "sft", run.name))
