"""The program's face: help, versions, mistakes and where a value comes from."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import typer

from medicalgpt_cli import __version__
from medicalgpt_cli.commands.bridge import command_function, read_recipe
from medicalgpt_cli.commands.catalogue import COMMANDS, find
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import flag_of, options_of
from medicalgpt_cli.settings.planning import PlanSettings
from medicalgpt_cli.settings.stages import SftSettings
from tests.cli import medgpt
from tests.tiny import tiny_model, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    tiny_model(folder / "model")
    rows = [{"question": f"Question {n}?", "answer": f"Answer {n}."} for n in range(20)]
    write_jsonl(folder / "train.jsonl", rows)
    return folder


def dry_run(place: Path, *more: str, env: dict[str, str] | None = None) -> dict:
    done = medgpt(
        *("sft", "--base-model", "model", "--train-data", "train.jsonl", "--dry-run", "--json", *more),
        cwd=place,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_lists_every_command_without_heavy_imports() -> None:
    done = medgpt("--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    for command in COMMANDS:
        assert command.name.split()[0] in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in imported  # the list is real
    assert not imported & {"torch", "transformers", "trl", "peft", "datasets", "gradio"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_each_command_names_every_flag_and_three_examples(command) -> None:
    done = medgpt(*command.name.split(), "--help", env={"COLUMNS": "200"})
    assert done.returncode == 0
    for name, (_, about) in options_of(command.settings).items():
        if not about.argument and not about.hidden:
            assert flag_of(name) in done.stdout
    assert len(command.examples) == 3
    for example in command.examples:
        assert example in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "example", [example for command in COMMANDS for example in command.examples], ids=lambda example: example
)
def test_every_flag_of_the_examples_is_understood(example: str) -> None:
    """The command's own Typer signature takes the words and makes settings of them; nothing is run."""
    command, words = find(shlex.split(example)[1:])
    made = []
    program = typer.Typer(add_completion=False)
    program.command()(command_function(command.name, command.settings, made.append))
    program(args=words, standalone_mode=False)
    assert isinstance(made[0], command.settings)


def test_version() -> None:
    assert medgpt("--version").stdout.strip() == f"medgpt {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("sft", "--lerning-rate", "1"), "--lerning-rate", "--learning-rate"),
        (("sfd",), "sfd", "sft"),
        (("sft", "--train-data", "x", "--batch-size", "0"), "--batch-size 0", "at least 1"),
        (("sft", "--train-data", "x", "--learning-rate", "-1"), "--learning-rate -1", "above 0"),
        (("sft", "--train-data", "x", "--learning-rate", "nan"), "--learning-rate nan", "above 0"),
        (("sft", "--train-data", "x", "--tuning", "lorra"), "--tuning lorra", "did you mean lora?"),
        (("sft", "--train-data", "x", "--use-cpu", "--gpus", "0"), "contradict", "one of them"),
        (("sft", "--train-data", "x", "--epochs", "many"), "--epochs", "--help"),
        (("sft",), "--train-data is missing", "medgpt data"),
        (("infer",), "--data-file is missing", "--interactive"),
        (
            ("infer", "--data-file", "a", "--predictions-file", "b", "--top-p", "0.5"),
            "--top-p",
            "--temperature",
        ),
        (("chat", "--base-model", "x", "--json"), "--json", "infer"),
        (("infer", "--interactive", "--json"), "--json", "--interactive"),
        (("merge-lora",), "--lora-model is missing", "adapter"),
        # An option that would have no effect is refused.
        (("plan", "sft", "--train-data", "x", "--accept-other-base"), "--accept-other-base", "--help"),
        (("plan", "sft", "--train-data", "x", "--group-readable"), "--group-readable", "hint"),
        (("plan", "infer", "--data-file", "x", "--accept-other-base"), "--accept-other-base", "--help"),
        (("data", "x", "--dtype", "bf16"), "--dtype", "--help"),
        (("data", "x", "--template", "chatml"), "--template", "--base-model"),
        (("pull", "smollm2-135m", "--list"), "a model's name", "one of them"),
        (("pull", "smollm2-135m", "--from-file", "x", "--source", "hub"), "--source", "one of them"),
        (("infer", "--interactive", "--batch-size", "4"), "--batch-size", "leave out"),
        (
            ("sft", "--train-data", "x", "--eval-data", "y", "--eval-fraction", "0.1"),
            "--eval-fraction",
            "one",
        ),
        (
            ("rl", "--train-data", "x", "--reward-rule", "length", "--reward-weight", "2"),
            "--reward-weight",
            "model",
        ),
        (
            ("rl", "--train-data", "x", "--reward-model", "y", "--length-target", "9"),
            "--length-target",
            "length",
        ),
        (
            ("rl", "--train-data", "x", "--reward-rule", "length", "--kl-horizon", "9"),
            "--kl-horizon",
            "--kl-target",
        ),
        (("sft", "--train-data", "x", "--recipe", "absent.yaml"), "absent.yaml", "YAML"),
    ],
)
def test_mistakes_are_one_line_and_a_hint(arguments, message: str, hint: str, tmp_path: Path) -> None:
    done = medgpt(*arguments, cwd=tmp_path, env={"COLUMNS": "300", "PYTHONPROFILEIMPORTTIME": "1"})
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(said) == 2 and said[0].startswith("error:") and said[1].startswith("hint:"), said
    assert message in said[0]
    assert hint in said[1]
    assert "| torch\n" not in done.stderr.replace(" ", "").replace("|", "| ")  # said before anything heavy


def test_a_value_comes_from_flag_then_environment_then_recipe_then_default(place: Path) -> None:
    recipe = place / "recipe.yaml"
    recipe.write_text("learning-rate: 0.001\nbatch-size: 2\nlora-rank: 3\n")
    settings = dry_run(
        *(place, "--recipe", "recipe.yaml", "--learning-rate", "0.003"),
        env={"MEDGPT_SFT_LEARNING_RATE": "0.002", "MEDGPT_SFT_BATCH_SIZE": "5"},
    )["settings"]
    assert settings["learning_rate"] == {"value": 0.003, "origin": "flag"}
    assert settings["batch_size"] == {"value": 5, "origin": "environment"}
    assert settings["lora_rank"] == {"value": 3, "origin": "recipe"}
    assert settings["seed"] == {"value": 42, "origin": "default"}


def test_underscores_in_flags_are_accepted(place: Path) -> None:
    assert dry_run(place, "--learning_rate", "0.5")["settings"]["learning_rate"]["value"] == 0.5


def test_dry_run_writes_nothing(place: Path) -> None:
    before = sorted(place.rglob("*"))
    plan = dry_run(place, "--epochs", "2", "--batch-size", "4")["plan"]
    assert plan["examples"] + plan["held_out_examples"] == 20
    assert plan["updates"] == 2 * plan["updates_per_epoch"]
    assert sorted(place.rglob("*")) == before


def test_unknown_recipe_keys_are_named_with_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning-rat: 1\n")
    with pytest.raises(UsageError, match="learning-rat") as caught:
        read_recipe(recipe, SftSettings)
    assert caught.value.hint == "did you mean learning-rate?"
    recipe.write_text("a: [1\nb: 2")
    with pytest.raises(UsageError, match=r"r\.yaml:2: not valid YAML"):
        read_recipe(recipe, SftSettings)


def test_every_field_is_declared_with_help() -> None:
    for command in COMMANDS:
        fixed = (
            {"origins", *command.settings.FIXED}
            if issubclass(command.settings, PlanSettings)
            else {"origins"}
        )
        for field in dataclasses.fields(command.settings):
            assert field.name in fixed or field.metadata["option"].help.endswith((".", ")"))
