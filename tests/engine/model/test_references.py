"""What a model name means, and what is said when it means nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medicalgpt_cli.engine.model.references import resolve, resolve_models
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.groups import ModelSettings


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, an adapter over it in a run folder, and a pulled model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDGPT_HOME", str(tmp_path / "home"))
    model_folder(tmp_path / "base")
    model_folder(tmp_path / "home" / "models" / "small-7b")
    adapter_folder(tmp_path / "runs" / "sft-1" / "model", str(tmp_path / "base"))
    run_json(tmp_path / "runs" / "sft-1")
    return tmp_path


def model_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")


def adapter_folder(folder: Path, base: str | None, tokenizer: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    if tokenizer:
        (folder / "tokenizer_config.json").write_text("{}")


def run_json(folder: Path, status: str = "done") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, "stage": "sft", "status": status}))


def test_folder_pulled_name_gguf_and_hub_name(place: Path) -> None:
    (place / "x.gguf").write_bytes(b"GGUF")
    assert resolve("base").kind == "folder"
    assert resolve("small-7b").path == str(place / "home" / "models" / "small-7b")
    assert resolve("x.gguf").kind == "gguf"
    hub = resolve("owner/name")
    assert (hub.kind, hub.path, hub.folder) == ("hub", "owner/name", None)


def test_an_adapter_alone_finds_its_base_and_its_tokenizer(place: Path) -> None:
    for settings in (ModelSettings(lora_model="runs/sft-1"), ModelSettings(base_model="runs/sft-1")):
        found = resolve_models(settings)
        assert found.base.path == str(place / "base")
        assert found.adapter is not None and Path(found.adapter.path) == Path("runs/sft-1/model")
        assert Path(found.tokenizer) == Path("runs/sft-1/model")


@pytest.mark.parametrize("recorded", ["base", "../../../base", "small-7b"])
def test_a_base_is_found_as_written_or_from_the_adapter_folder(place: Path, recorded: str) -> None:
    adapter_folder(place / "runs" / "other" / "model", recorded, tokenizer=False)
    found = resolve_models(ModelSettings(lora_model="runs/other/model"))
    assert Path(found.base.path).resolve() in ((place / "base"), place / "home" / "models" / "small-7b")
    assert found.tokenizer == found.base.path


@pytest.mark.parametrize("recorded", [".", "", None, "gone", "runs/loop", "../../loop"])
def test_an_adapter_without_a_base_asks_for_it(place: Path, recorded: str | None) -> None:
    adapter_folder(place / "runs" / "loop" / "model", recorded)
    run_json(place / "runs" / "loop")
    with pytest.raises(UsageError, match="base of runs/loop was not found") as caught:
        resolve_models(ModelSettings(lora_model="runs/loop"))
    assert "--base-model" in str(caught.value.hint)
    named = resolve_models(ModelSettings(lora_model="runs/loop", base_model="base"))
    assert named.base.path == "base"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("bsae", "base"),
        ("smal-7b", "small-7b"),
        ("runs/sft-2", "runs/sft-1"),
        ("sub/modl", "sub/model"),
    ],
)
def test_a_name_that_leads_nowhere_gets_the_nearest(place: Path, name: str, near: str) -> None:
    model_folder(place / "sub" / "model")
    with pytest.raises(UsageError, match="no model named") as caught:
        resolve(name)
    assert caught.value.hint == f"did you mean {near}?"


def test_what_is_no_model_is_said(place: Path) -> None:
    (place / "empty").mkdir()
    (place / "notes.txt").write_text("x")
    run_json(place / "runs" / "half", "stopped")
    broken = place / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    for name, words in {
        "empty": "folder without a model",
        "notes.txt": "no .gguf model",
        "runs/half": "no model yet .the run is stopped",
        "broken": "not a JSON object",
    }.items():
        with pytest.raises(UsageError, match=words):
            resolve(name)


def test_contradictions_are_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="whole model"):
        resolve_models(ModelSettings(lora_model="base"))
    with pytest.raises(UsageError, match="itself an adapter"):
        resolve_models(ModelSettings(base_model="runs/sft-1", lora_model="runs/sft-1"))
    with pytest.raises(UsageError, match="holds no tokenizer"):
        resolve_models(ModelSettings(base_model="base", tokenizer_path="runs"))
