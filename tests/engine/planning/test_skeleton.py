"""Parameters without weights against models that are really built."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from medicalgpt_cli.engine.model.adapters import add_adapter
from medicalgpt_cli.engine.planning.memory import moments_bytes, quantised_bytes
from medicalgpt_cli.engine.planning.skeleton import Outline, build, count
from medicalgpt_cli.settings.groups import AdapterSettings
from tests.engine.planning.configs import llama, qwen_7b

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2, biases": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}


def real(config):
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_what_the_real_model_has(name: str) -> None:
    model = real(CONFIGS[name])
    whole = count(build(Outline(CONFIGS[name], torch.float32, tuning=AdapterSettings(tuning="full"))))
    held = sum(weight.numel() for weight in model.parameters())
    assert (whole.total, whole.trainable, whole.base_bytes) == (held, held, 4 * held)
    tables = {id(one.weight): one.weight.numel() for one in (model.get_input_embeddings(), model.lm_head)}
    assert whole.embeddings == sum(tables.values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("more", [{}, {"dora": True, "lora_rank": 4}, {"embeddings": "all"}])
def test_what_learns_is_what_learns_in_a_real_adapter(name: str, more: dict) -> None:
    settings = AdapterSettings(**more)
    wrapped = add_adapter(real(CONFIGS[name]), settings, seed=0)
    found = count(build(Outline(CONFIGS[name], torch.float32, tuning=settings)))
    learns = sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)
    assert found.trainable == learns
    assert found.total == sum(weight.numel() for weight in wrapped.parameters())


def test_published_sizes() -> None:
    """The counts that the models' own pages give, in billions."""
    for config, billions in (
        (llama("7B"), 6.74),
        (llama("13B"), 13.02),
        (llama("70B"), 68.98),
        (qwen_7b(), 7.62),
    ):
        assert count(build(Outline(config, torch.bfloat16))).total / 1e9 == pytest.approx(billions, abs=0.005)


def bytes_held(module) -> int:
    """Bytes of a quantised layer's weights and of all that belongs to them."""
    weight = module.weight
    held = [weight.data]
    if isinstance(module, Linear4bit):
        state = weight.quant_state
        held += [state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
    else:
        held.append(weight.SCB if weight.SCB is not None else module.state.SCB)
    return sum(one.untyped_storage().nbytes() for one in held)


@pytest.mark.parametrize("shape", [(64, 96), (576, 1536), (192, 576)])
def test_quantised_weights_take_what_the_library_takes(shape: tuple[int, int]) -> None:
    rows, columns = shape
    four = Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    four(torch.zeros(1, columns))
    eight = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False).to("cpu")
    eight(torch.zeros(1, columns))
    assert bytes_held(four) == quantised_bytes("4bit", rows, columns)
    assert bytes_held(eight) == quantised_bytes("8bit", rows, columns)


def test_a_quantised_model_keeps_its_head_and_embeddings() -> None:
    config = CONFIGS["llama, untied"]
    found = count(build(Outline(config, torch.float32, tuning=AdapterSettings(), quantization="8bit")))
    linear = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    rows = 3 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    rest = 2 * 300 * 32 + (2 * 3 + 1) * 32
    assert found.base_bytes == linear + 4 * rows + 4 * rest


def test_an_adapter_that_goes_on_and_frozen_weights() -> None:
    config = CONFIGS["llama, tied"]
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    learns = count(build(Outline(config, torch.float32, tuning=AdapterSettings(), adapter=adapter)))
    assert learns.trainable == 3 * 2 * (32 + 32)
    still = count(build(Outline(config, torch.float32, adapter=adapter)))
    assert (still.trainable, still.adapter) == (0, learns.trainable)
    assert get_peft_model(real(config), adapter).get_nb_trainable_parameters()[0] == learns.trainable


def test_moments() -> None:
    assert moments_bytes(1000, "adamw") == 8000
    assert moments_bytes(1024, "adamw-8bit") == 2 * (1024 + 4 * 4)
