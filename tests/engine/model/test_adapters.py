"""Adapters: which layers, which variants, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from medicalgpt_cli.engine.model.adapters import add_adapter, different_shape, save_adapter
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.groups import AdapterSettings
from tests.tiny import tiny_model

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


def adapted(folder: Path, seed: int = 1, **options):
    return add_adapter(AutoModelForCausalLM.from_pretrained(folder), AdapterSettings(**options), seed=seed)


def layers(model) -> set[str]:
    return {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }


def test_all_linear_layers_but_the_head_are_found(folder: Path) -> None:
    model = adapted(folder)
    assert layers(model) == LINEAR
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_named_layers_and_a_misspelt_one(folder: Path) -> None:
    assert layers(adapted(folder, target_modules=("q_proj", "v_proj"))) == {"q_proj", "v_proj"}
    with pytest.raises(UsageError) as caught:
        adapted(folder, target_modules=("q_porj",))
    assert caught.value.hint == "did you mean q_proj?"
    with pytest.raises(UsageError, match="goes alone"):
        adapted(folder, target_modules=("all", "q_proj"))


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(folder: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.manual_seed(99)
    first = adapted(folder)
    assert torch.equal(first.eval()(ids).logits, base)
    torch.manual_seed(7)
    again, other = adapted(folder), adapted(folder, seed=2)
    name = next(name for name, _ in first.named_parameters() if "lora_A" in name)
    weight = first.get_parameter(name)
    assert torch.equal(weight, again.get_parameter(name))
    assert not torch.equal(weight, other.get_parameter(name))


@pytest.mark.parametrize(("options", "key"), [({"dora": True}, "use_dora"), ({"rslora": True}, "use_rslora")])
def test_variants_are_reachable(folder: Path, tmp_path: Path, options: dict, key: str) -> None:
    save_adapter(adapted(folder, **options), tmp_path / "a", str(folder))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())[key] is True


def test_what_is_saved_is_an_ordinary_adapter(folder: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model = adapted(folder, lora_rank=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    save_adapter(model, tmp_path / "a", str(folder))
    assert sorted(one.name for one in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder.resolve())
    ids = torch.tensor([[5, 6, 7, 8]])
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")  # PEFT without medgpt
    assert torch.equal(alone.eval()(ids).logits, model.eval()(ids).logits)


def test_a_differing_shape_is_found(folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted(folder, lora_rank=4), tmp_path / "a", str(folder))
    assert different_shape(tmp_path / "a", AdapterSettings(lora_rank=4)) == {}
    assert different_shape(tmp_path / "a", AdapterSettings(dora=True)) == {"lora_rank": 4, "dora": False}
