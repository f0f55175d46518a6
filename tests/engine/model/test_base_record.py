"""An adapter over another base than its own is refused by every command, unless it is accepted, which is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from medicalgpt_cli.engine.model.base_record import RECORD, check_base, known_base, read_record
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training import origins
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.groups import ModelSettings
from tests.cli import medgpt
from tests.tiny import tiny_model, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An adapter over `model`, a reward model over it, and `other`: the same shapes with one number changed."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_model(folder / "model")
    shutil.copytree(folder / "model", folder / "other")
    weights = load_file(folder / "other" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    rows = [{"prompt": f"What {n}?", "chosen": "Rest.", "rejected": f"no {n}"} for n in range(8)]
    write_jsonl(folder / "pairs.jsonl", rows)
    write_jsonl(folder / "talk.jsonl", [{"question": row["prompt"], "answer": "Rest."} for row in rows])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    (folder / "in.txt").write_text("What?\n")
    for stage, data, run in (("sft", "talk.jsonl", "tuned"), ("reward", "pairs.jsonl", "rm")):
        done = medgpt(
            *(stage, "--base-model", "model", "--train-data", data, "--eval-fraction", "0"),
            *("--max-steps", "2", "--output-dir", run),
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
    return folder


def resolved(place: Path, base: str, adapter: str = "tuned"):
    return resolve_models(ModelSettings(base_model=str(place / base), lora_model=str(place / adapter)))


def test_the_record_travels_with_the_adapter(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "tuned" / "model", tmp_path / "copy")
    record = read_record(resolve_models(ModelSettings(lora_model=str(tmp_path / "copy"))).adapter)
    assert record.keys() == {"model.safetensors", "config.json", "generation_config.json"}
    parents = json.loads((place / "tuned" / "run.json").read_text())["parents"]
    assert parents["base"]["files"] == record
    assert check_base(resolved(place, "model"), Observer()) == []
    with pytest.raises(UsageError, match=r"trained over another base .*: model\.safetensors changed$"):
        check_base(resolved(place, "other"), Observer())


def test_a_resharded_copy_can_be_accepted(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(place / "model").save_pretrained(tmp_path, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path)
    models = resolve_models(ModelSettings(base_model=str(tmp_path), lora_model=str(place / "tuned")))
    with pytest.raises(UsageError, match=r"model\.safetensors is missing, .* is new"):
        check_base(models, Observer())
    assert check_base(models, Observer(), accept=True)[0] == "model.safetensors is missing"


def test_other_settings_of_answers_are_no_other_base(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text("{}")
    models = resolve_models(ModelSettings(base_model=str(tmp_path / "m"), lora_model=str(place / "tuned")))
    assert check_base(models, Observer()) == []


def test_an_adapter_without_a_record_is_taken_as_it_is(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "tuned" / "model", tmp_path / "plain")
    (tmp_path / "plain" / RECORD).unlink()
    models = resolve_models(
        ModelSettings(base_model=str(place / "other"), lora_model=str(tmp_path / "plain"))
    )
    assert check_base(models, Observer()) == []


@pytest.mark.parametrize("content", ["", "[]", '{"files": {"a": 1}}'])
def test_a_damaged_record_is_refused(place: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(place / "tuned" / "model", tmp_path / "copy")
    (tmp_path / "copy" / RECORD).write_text(content)
    models = resolve_models(ModelSettings(lora_model=str(tmp_path / "copy")))
    with pytest.raises(UsageError, match="not a record of a base model"):
        check_base(models, Observer())


def test_a_base_in_the_hubs_cache_is_followed_to_its_files(place: Path, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--own--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cache / "models--own--tiny" / "refs").mkdir()
    (cache / "models--own--tiny" / "refs" / "main").write_text("a" * 40)
    for file in (place / "other").iterdir():
        (snapshot / file.name).symlink_to(file)
    models = resolve_models(ModelSettings(base_model="own/tiny", lora_model=str(place / "tuned")))
    assert models.base.kind == "hub"
    assert check_base(models, Observer()) == []  # it is not here yet
    with (
        pytest.raises(UsageError, match="trained over another base"),
        known_base(models, Observer(), accept=False),
    ):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))  # loading fetches it
    with pytest.raises(UsageError, match=r"model\.safetensors changed"):
        check_base(models, Observer())
    # A run that begins before it is here knows it as soon as it is loaded.
    run = {"parents": {"base": {"name": "own/tiny", "files": None}}}
    with pytest.raises(UsageError, match=r"model\.safetensors changed"):
        origins.go_on(run, {"": models}, Observer(), tmp_path, accept=False)
    later = origins.go_on(run, {"": models}, Observer(), tmp_path, accept=True)
    assert later["parents"]["base"]["files"]["model.safetensors"]["bytes"] > 0
    assert later["accepted_other_base"][0]["base"] == ["model.safetensors changed"]


OVER_OTHER = ("--base-model", "other", "--lora-model", "tuned")
COMMANDS = {
    "infer": (*OVER_OTHER, "--data-file", "in.txt", "--predictions-file", "out.jsonl"),
    "chat": OVER_OTHER,
    "serve-demo": OVER_OTHER,
    "merge-lora": (*OVER_OTHER, "--output-dir", "merged"),
    "sft": (*OVER_OTHER, "--train-data", "talk.jsonl", "--output-dir", "more"),
    "rl": (*OVER_OTHER, "--train-data", "prompts.jsonl", "--reward-model", "rm", "--output-dir", "rl"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_another_base(place: Path, command: str) -> None:
    done = medgpt(command, *COMMANDS[command], cwd=place, input="")
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert "was trained over another base than other: model.safetensors changed" in said
    assert "--accept-other-base" in said
    assert not any((place / name).exists() for name in ("out.jsonl", "merged", "more", "rl"))


@pytest.mark.parametrize("command", ["score", "rl"])
def test_a_reward_model_over_a_changed_base_is_refused(place: Path, tmp_path: Path, command: str) -> None:
    shutil.copytree(place, tmp_path / "place")
    config = tmp_path / "place" / "rm" / "model" / "adapter_config.json"
    content = {**json.loads(config.read_text()), "base_model_name_or_path": str(place / "other")}
    config.write_text(json.dumps(content))
    arguments = {
        "score": ("--data-file", "pairs.jsonl", "--predictions-file", "scores.jsonl"),
        "rl": ("--base-model", "model", "--train-data", "prompts.jsonl", "--output-dir", "rl"),
    }[command]
    done = medgpt(command, "--reward-model", "rm", *arguments, cwd=tmp_path / "place")
    assert done.returncode == 2, done.stderr
    assert "rm was trained over another base" in " ".join(done.stderr.split())


def test_what_was_accepted_is_recorded(place: Path) -> None:
    done = medgpt(
        *("merge-lora", *OVER_OTHER, "--accept-other-base", "--output-dir", "accepted", "--json"), cwd=place
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accepted_other_base"] == ["model.safetensors changed"]
    done = medgpt(
        *("sft", *OVER_OTHER, "--accept-other-base", "--train-data", "talk.jsonl", "--eval-fraction", "0"),
        *("--max-steps", "1", "--output-dir", "accepted-run"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((place / "accepted-run" / "run.json").read_text())
    [entry] = manifest["accepted_other_base"]
    assert entry["base"] == ["model.safetensors changed"]
    # The new adapter's base is the one that it was trained over.
    assert check_base(resolved(place, "other", "accepted-run"), Observer()) == []
