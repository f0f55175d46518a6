"""Where LoRA goes in models of other families: on what text passes, not on what PEFT or the code of a model forbids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from medicalgpt_cli.engine.model.adapters import add_adapter, save_adapter, target_layers
from medicalgpt_cli.engine.model.loading import attach_adapter
from medicalgpt_cli.errors import MedgptError, UsageError
from medicalgpt_cli.settings.groups import AdapterSettings
from tests.cli import medgpt
from tests.conftest import DATA
from tests.engine.model.tiny_architectures import tiny_config
from tests.families import FAMILIES, family
from tests.tiny import tiny_tokenizer


def language_model(name: str):
    torch.manual_seed(0)
    config = family(name) if name in FAMILIES else tiny_config(name, 1280, 2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def with_lora(model) -> set[str]:
    """The names of the layers of the base that have LoRA."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, _ in model.named_parameters()
        if name.endswith(".lora_A.default.weight")
    }


# Of each family what is left out of "all", which PEFT calls unfit for these, or which is read past an adapter.
LEFT_OUT = {
    "falcon_h1": {"out_proj"},
    "mamba": {"dt_proj", "out_proj"},
    "mamba2": {"out_proj"},
    "nemotron_h": {"out_proj"},
    "jamba": {"dt_proj"},
    "llama": set(),
    "lfm2": set(),
    "qwen3_5_text": set(),
    "deepseek_v4": {"o_a_proj"},  # a linear layer by its class, not by what it computes
    "deepseek_v32": set(),
    "bart": set(),
    "big_bird": set(),
    "inkling2_text": {"weight_proj"},  # PEFT would not read it back
}
# Layers that are asked nothing, or whose answer only chooses among tokens.
UNREACHED = {
    "deepseek_v4": ["model.layers.*.self_attn.compressor.indexer"],
    "deepseek_v32": ["model.layers.*.self_attn.indexer"],
    "bart": ["model.decoder.layers.*.encoder_attn"],
    "big_bird": ["bert.pooler"],
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_all_is_what_can_have_lora_and_learns(name: str) -> None:
    base = language_model(name)
    targets = target_layers(base, ("all",))
    assert set(targets.refused) == LEFT_OUT[name] and not targets.beside
    assert list(targets.unreached) == UNREACHED.get(name, [])
    assert len(targets.notices(name)) == bool(LEFT_OUT[name]) + (name in UNREACHED)
    model = add_adapter(base, AdapterSettings(lora_dropout=0.0), seed=0)
    names = with_lora(model)
    assert names and not any(one.endswith(tuple(LEFT_OUT[name])) for one in names if LEFT_OUT[name])
    # DeepSeek V4 compresses 128 tokens into one, and looks no further back than that.
    text = torch.arange(3, 303 if name == "deepseek_v4" else 15)[None]
    model(input_ids=text, use_cache=False).logits.logsumexp(-1).sum().backward()
    unmoved = [
        name
        for name, weight in model.named_parameters()
        if "lora_B" in name and (weight.grad is None or not weight.grad.any())
    ]
    assert not unmoved  # an adapter that nobody asks would stay what it is, without a word


@pytest.mark.parametrize("named", [("all",), ("q_proj", "v_proj")])
def test_lora_stays_out_of_what_a_wrapper_sees_with(named: tuple[str, ...]) -> None:
    base = language_model("gemma3")
    linear = {
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model" in name
        if named == ("all",) or name.endswith(named)
    }
    assert any("vision_tower" in name and "q_proj" in name for name, _ in base.named_modules())
    targets = target_layers(base, named)
    model = add_adapter(base, AdapterSettings(target_modules=named), seed=0)
    assert with_lora(model) == linear
    if named == ("all",):
        assert set(targets.beside) == {"model.vision_tower", "model.multi_modal_projector"}
        assert "no text passes there" in targets.notices("gemma3")[0]


@pytest.mark.parametrize(
    ("name", "layer", "says"),
    [
        ("mamba2", "out_proj", "cannot have LoRA"),
        ("jamba", "dt_proj", "cannot have LoRA"),
        ("glm4_moe", "gate_proj", "cannot have LoRA"),
        ("gemma3", "fc1", "no text passes"),
        ("llama", "self_attn", "no such layer"),
    ],
)
def test_a_named_layer_that_cannot_have_lora_is_refused(name: str, layer: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        target_layers(language_model(name), (layer,))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "left_out", "layer"),
    [("falcon_h1", "no LoRA on out_proj", "out_proj"), ("gemma3", "no LoRA on model.vision_tower", "fc1")],
)
def test_a_stage_says_what_it_leaves_out(name: str, left_out: str, layer: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    language_model(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = (
        "--base-model",
        tmp_path / "model",
        "--train-data",
        DATA / "medquad_en_alpaca.jsonl",
        "--use-cpu",
    )
    flags = ("sft", *flags, "--max-length", 48, "--max-steps", 1, "--batch-size", 2, "--eval-fraction", 0)
    done = medgpt(*flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 0 and left_out in done.stderr and "plan: " in done.stderr, done.stderr
    done = medgpt(
        "merge-lora", "--lora-model", tmp_path / "run", "--output-dir", tmp_path / "merged", "--use-cpu"
    )
    assert done.returncode == 0, done.stderr
    done = medgpt(*flags, "--output-dir", tmp_path / "other", "--target-modules", layer)
    assert done.returncode == 2 and f"--target-modules {layer}" in done.stderr and "hint: " in done.stderr


def test_a_layer_that_no_gradient_reaches_is_left_out_by_its_name_too() -> None:
    targets = target_layers(language_model("bart"), ("k_proj",))
    assert targets.layers == [f"model.decoder.layers.{layer}.self_attn.k_proj" for layer in range(4)]
    assert targets.unreached == ("model.decoder.layers.*.encoder_attn",)
    with pytest.raises(UsageError, match="no gradient of the loss reaches"):
        target_layers(language_model("deepseek_v32"), ("wq_b",))


def test_an_adapter_that_peft_does_not_read_back_is_refused(tmp_path: Path) -> None:
    """PEFT renames what it reads of some layers, and leaves them as they were with a warning."""
    from peft import LoraConfig, get_peft_model

    base = language_model("inkling2_text")
    torch.manual_seed(7)  # what is not read is drawn anew, behind the seed of the base
    wrapped = get_peft_model(base, LoraConfig(target_modules=["weight_proj"], init_lora_weights=False))
    save_adapter(wrapped, tmp_path, "nowhere")
    with pytest.raises(MedgptError, match="PEFT does not read 8 weights of the adapter"):
        attach_adapter(language_model("inkling2_text"), tmp_path)
    with pytest.raises(UsageError, match="--target-modules weight_proj"):
        target_layers(language_model("inkling2_text"), ("weight_proj",))


def test_experts_in_some_layers_leave_the_blocks_of_the_others() -> None:
    """Nemotron-H calls every block "mixer": with experts in one layer, the others go on having adapters."""
    model = AutoModelForCausalLM.from_config(tiny_config("nemotron_h", 1280, 2))
    layers = target_layers(model, ("all",)).layers
    kinds = model.config.layers_block_type
    assert "moe" in kinds
    assert {int(name.split(".")[2]) for name in layers} == {
        n for n, kind in enumerate(kinds) if kind != "moe"
    }


def test_a_model_of_experts_alone_says_that_it_has_no_place_for_an_adapter() -> None:
    with pytest.raises(UsageError, match="no layer of jetmoe gets an adapter by itself") as caught:
        target_layers(language_model("jetmoe"), ("all",))
    assert "--target-modules" in caught.value.hint and "kv_proj" in caught.value.hint
    assert target_layers(language_model("jetmoe"), ("kv_proj",)).layers == ["kv_proj"]
