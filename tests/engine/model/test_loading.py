"""What is refused when weights are loaded, and what they are loaded as."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from medicalgpt_cli.engine.model.adapters import add_adapter, save_adapter
from medicalgpt_cli.engine.model.loading import attach_adapter, choose_device, choose_dtype, load_model
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.errors import EnvironmentFailure, UnsafeRefused, UsageError
from medicalgpt_cli.settings.groups import AdapterSettings, DeviceSettings, ModelSettings
from tests.families import family
from tests.tiny import tiny_model


def load(folder: Path, **options):
    settings = ModelSettings(base_model=str(folder), use_cpu=True, **options)
    return load_model(settings, resolve_models(settings))


def adapter_over(model: Path, folder: Path, **options) -> Path:
    """An adapter that changes the answers, saved as medgpt saves it."""
    net = add_adapter(load(model), AdapterSettings(**options), seed=1)
    torch.manual_seed(2)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    save_adapter(net, folder, str(model))
    return folder


def test_device_and_format() -> None:
    cpu = choose_device(DeviceSettings(use_cpu=True))
    assert cpu.type == "cpu"
    assert choose_dtype(DeviceSettings(), cpu) == torch.float32
    assert choose_dtype(DeviceSettings(dtype="bf16"), cpu) == torch.bfloat16
    with pytest.raises(EnvironmentFailure, match="--gpus 97: 0 of these 1 GPUs"):
        choose_device(DeviceSettings(gpus="97"))


def test_a_model_is_loaded_without_gradients_in_the_asked_format(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path / "m"), dtype="bf16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


def test_pickled_weights_and_foreign_code_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UnsafeRefused, match="pickled"):
        load(model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UnsafeRefused, match="code of its own"):
        load(model)


def test_incomplete_weights_are_refused_and_not_made_up(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="1 weights are missing"):
        load(model)


@pytest.mark.skipif(find_spec("timm") is not None, reason="the package is there")
def test_a_package_that_a_model_needs_is_named(tmp_path: Path) -> None:
    """The tower for pictures of Gemma 3n comes from a package of its own."""
    model = tiny_model(tmp_path / "m")
    config = AutoConfig.for_model("gemma3n", text_config=family("gemma3n_text").to_dict())
    config.save_pretrained(model)
    with pytest.raises(EnvironmentFailure, match="needs a package") as caught:
        load(model)
    assert caught.value.hint == "pip install timm"


def test_damaged_files_are_said(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="cannot be loaded"):
        load(model)
    adapter = adapter_over(tiny_model(tmp_path / "whole"), tmp_path / "a")
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UsageError, match="damaged"):
        attach_adapter(load(tmp_path / "whole"), adapter)


def test_an_adapter_is_applied(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    adapter = adapter_over(model, tmp_path / "a")
    settings = ModelSettings(lora_model=str(adapter), tokenizer_path=str(model), use_cpu=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain, tuned = load(model)(ids).logits, load_model(settings, resolve_models(settings))(ids).logits
    assert (plain - tuned).abs().max() > 0.01


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    """Other shapes, layers too many, layers too few: PEFT itself only warns at the last two."""
    model = tiny_model(tmp_path / "m")
    adapter = adapter_over(model, tmp_path / "a")
    weights = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(weights))
    for name, changed in {
        "shape": {**weights, first: torch.zeros(3, 3)},
        "more": {**weights, first.replace("layers.0", "layers.9"): weights[first].clone()},
        "fewer": {key: value for key, value in weights.items() if key != first},
    }.items():
        save_file(changed, adapter / "adapter_model.safetensors")
        with pytest.raises(UsageError, match="does not fit"):
            attach_adapter(load(model), adapter)
        assert name
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsafeRefused, match="pickled"):
        attach_adapter(load(model), adapter)
