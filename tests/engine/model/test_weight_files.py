"""Weights that are not numbers, not used, or not the model's own are refused; what is harmless is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from medicalgpt_cli.engine.model.loading import load_base, load_model
from medicalgpt_cli.engine.model.references import ModelReference, resolve_models
from medicalgpt_cli.engine.model.reward_model import check_head, load_reward_model
from medicalgpt_cli.engine.model.weight_files import _beyond_the_layers, weight_files
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UnsafeRefused, UsageError
from medicalgpt_cli.settings.groups import ModelSettings
from tests.engine.model.test_loading import adapter_over
from tests.engine.model.tiny_gguf import tiny_gguf
from tests.tiny import tiny_model

CPU = torch.device("cpu")


class Heard(Observer):
    def __init__(self) -> None:
        self.notices: list[str] = []

    def on_notice(self, text: str) -> None:
        self.notices.append(text)


def load(folder: Path, **options):
    heard = Heard()
    settings = ModelSettings(base_model=str(folder), use_cpu=True, **options)
    return load_model(settings, resolve_models(settings), observer=heard), heard.notices


def change_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


def change_weights(file: Path, **new: torch.Tensor | None) -> None:
    weights = {**load_file(file), **{name.replace("__", "."): one for name, one in new.items()}}
    save_file(weights, file, metadata={"format": "pt"})


def spoilt(file: Path, name: str, number: float) -> None:
    weights = load_file(file)
    found = next(one for one in sorted(weights) if name in one)
    weights[found].view(-1)[-1] = number
    save_file(weights, file, metadata={"format": "pt"})


def test_a_config_with_fewer_layers_than_the_files_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    change_config(model, num_hidden_layers=1)
    with pytest.raises(UsageError, match=r"m: 9 weights of the files have no place .* model\.layers\.1\."):
        load(model)


@pytest.mark.parametrize("values", [{"num_hidden_layers": 3}, {"intermediate_size": 64}])
def test_a_config_of_other_shapes_is_refused(tmp_path: Path, values: dict[str, int]) -> None:
    model = tiny_model(tmp_path / "m")
    change_config(model, **values)
    with pytest.raises(UsageError, match=r"weights are missing|other shapes"):
        load(model)


def test_harmless_extras_are_named(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    _, before = load(model)
    change_weights(
        model / "model.safetensors",
        **{
            "model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(8),
            "score__weight": torch.ones(1, 64),
            "v_head__summary__weight": torch.ones(1, 64),
        },
    )
    _, notices = load(model)
    new = [one for one in notices if one not in before]
    assert len(new) == 1, new
    assert "heads of other tasks (2)" in new[0]
    assert "buffers that are computed (1)" in new[0]


def test_layers_that_an_architecture_leaves_out_are_named(tmp_path: Path) -> None:
    """GLM-4 MoE files hold a layer that predicts further tokens, which the library does not use."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=1,
    )  # fmt: skip
    Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    change_weights(tmp_path / "model.safetensors", model__layers__46__eh_proj__weight=torch.ones(2, 2))
    heard = Heard()
    load_base(ModelReference("glm", "folder", str(tmp_path)), torch.float32, CPU, observer=heard)
    assert heard.notices == ["glm: weights that are not used: parts that this architecture leaves out (1)"]


def test_a_gguf_file_with_more_blocks_than_its_header_counts_is_refused(tmp_path: Path) -> None:
    import gguf

    file, _ = tiny_gguf(tmp_path)
    header = gguf.GGUFReader(file, "r+").get_field("llama.block_count")
    header.parts[header.data[0]][0] = 1
    with pytest.raises(UsageError, match="the file has 2 blocks, and its header counts 1"):
        load_base(ModelReference("tiny", "gguf", str(file)), torch.float32, CPU)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, number: float) -> None:
    model = tiny_model(tmp_path / "m")
    spoilt(model / "model.safetensors", "down_proj", number)
    with pytest.raises(UsageError, match=r"m: .*down_proj\.weight holds numbers that are not finite"):
        load(model)


def test_large_weights_are_numbers(tmp_path: Path) -> None:
    """Their sum is none in fp32."""
    model = tiny_model(tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    load(model)
    with pytest.raises(UsageError, match=r"not finite in fp16"):
        load(model, dtype="fp16")


def test_an_adapter_with_weights_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    adapter = adapter_over(model, tmp_path / "a")
    spoilt(adapter / "adapter_model.safetensors", "lora_B", math.nan)
    settings = ModelSettings(lora_model=str(adapter), use_cpu=True)
    with pytest.raises(UsageError, match=r"lora_B.* not finite"):
        load_model(settings, resolve_models(settings))


@pytest.mark.parametrize("extra", [True, False])
def test_an_adapter_with_weights_too_many_or_too_few_is_refused(tmp_path: Path, extra: bool) -> None:
    model = tiny_model(tmp_path / "m")
    adapter = adapter_over(model, tmp_path / "a")
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(weights))
    if extra:
        weights[name.replace("layers.0", "layers.7").replace("layers.1", "layers.7")] = weights[name].clone()
    else:
        del weights[name]
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = ModelSettings(lora_model=str(adapter), use_cpu=True)
    with pytest.raises(UsageError, match="does not fit"):
        load_model(settings, resolve_models(settings))


def test_a_reward_model_without_numbers_or_with_another_layer_count_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base, folder = tiny_model(tmp_path / "m"), tmp_path / "rm"
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    resolved = resolve_models(ModelSettings(base_model=str(folder)))
    load_reward_model(resolved, torch.float32, CPU)
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(UsageError, match="have no place"):
        load_reward_model(resolved, torch.float32, CPU)
    change_config(folder, num_hidden_layers=2)
    spoilt(folder / "model.safetensors", "score", math.nan)
    with pytest.raises(UsageError, match=r"score\.weight holds numbers that are not finite"):
        load_reward_model(resolved, torch.float32, CPU)


def test_a_reward_adapter_with_weights_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base, folder = tiny_model(tmp_path / "m"), tmp_path / "rm"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    get_peft_model(model, config).save_pretrained(folder)
    reward = resolve_models(ModelSettings(lora_model=str(folder))).adapter
    check_head(reward)
    spoilt(folder / "adapter_model.safetensors", "score", math.inf)
    with pytest.raises(UsageError, match=r"score.* not finite"):
        check_head(reward)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_weights_that_are_quantised_as_they_are_loaded_are_looked_at_in_the_file(
    tmp_path: Path, bits: str
) -> None:
    model = tiny_model(tmp_path / "m")
    spoilt(model / "model.safetensors", "down_proj", math.nan)
    base = ModelReference("m", "folder", str(model))
    with pytest.raises(UsageError, match="not finite"):
        load_base(base, torch.float32, CPU, quantization=bits)


def sharded(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model(folder / "whole")
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder / "m", max_shard_size="100KB")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "m")
    assert (folder / "m" / "model.safetensors.index.json").is_file()
    return folder / "m"


def rename_a_shard(model: Path, name: object) -> str:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["model.norm.weight"]
    content["weight_map"] = {
        key: name if value == shard else value for key, value in content["weight_map"].items()
    }
    index.write_text(json.dumps(content))
    return shard


@pytest.mark.parametrize(
    "where", ["../stolen.safetensors", "/{tmp}/stolen.safetensors", "a/../../stolen.safetensors"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, where: str) -> None:
    model = sharded(tmp_path)
    name = where.format(tmp=str(tmp_path).lstrip("/"))
    shard = rename_a_shard(model, name)
    (model / "a").mkdir()
    (model / shard).rename(tmp_path / "stolen.safetensors")
    with pytest.raises(UnsafeRefused, match="outside the model's folder"):
        load(model)


def test_shards_that_are_links_are_loaded(tmp_path: Path) -> None:
    """The hub's cache has them so."""
    model = sharded(tmp_path)
    whole = [one.clone() for one in load(tmp_path / "whole")[0].parameters()]
    for number, file in enumerate(sorted(model.glob("*.safetensors"))):
        file.rename(tmp_path / f"blob{number}")
        file.symlink_to(tmp_path / f"blob{number}")
    loaded = load(model)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole, loaded.parameters(), strict=True))


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises((UsageError, UnsafeRefused)):
        weight_files(tmp_path, "m")


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    model = sharded(tmp_path)
    shard = rename_a_shard(model, "other.safetensors")
    (model / shard).unlink()
    with pytest.raises(UsageError, match=r"other\.safetensors is missing"):
        load(model)


def test_a_weight_that_stands_in_two_files_is_refused(tmp_path: Path) -> None:
    """The library would take whichever comes last."""
    model = tiny_model(tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    first, second = sorted(weights)[:6], sorted(weights)[5:]
    for number, names in enumerate((first, second)):
        save_file({name: weights[name] for name in names}, model / f"{number}.safetensors", {"format": "pt"})
    index = dict.fromkeys(first, "0.safetensors") | dict.fromkeys(second, "1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (model / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=rf"m: {first[-1]} stands in 0\.safetensors and in 1\.safetensors"):
        load(model)


def test_layers_beyond_the_model_are_found_without_the_librarys_word(tmp_path: Path) -> None:
    """ZeRO-3 loads without saying what it did not use."""
    model = tiny_model(tmp_path / "m")
    loaded, _ = load(model)
    files = [model / "model.safetensors"]
    assert _beyond_the_layers(files, loaded) == []
    change_config(model, num_hidden_layers=1)
    shorter = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    beyond = _beyond_the_layers(files, shorter)
    assert len(beyond) == 9 and all(name.startswith("model.layers.1.") for name in beyond)
