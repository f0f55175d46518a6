"""Operations of a run against torch's own counter on real passes, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.model.adapters import add_adapter
from medicalgpt_cli.engine.planning import work
from medicalgpt_cli.engine.planning.work import Shape, forward, shape_of, training
from medicalgpt_cli.engine.training.batches import IGNORED, padded
from medicalgpt_cli.engine.training.losses import target_loss
from medicalgpt_cli.settings.groups import AdapterSettings

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",  # whose two products a pair of tokens the counter sees whole
}
LENGTH, ROWS = 24, 2
TOKENS, PAIRS = ROWS * LENGTH, ROWS * LENGTH**2


def counted(model, backward: bool) -> float:
    examples = [Example(list(range(LENGTH)), [IGNORED, *range(1, LENGTH)], "") for _ in range(ROWS)]
    batch = padded(examples, 0)
    target_loss(model, batch)  # asks the model about its head
    with FlopCounterMode(display=False) as counter:
        loss = target_loss(model, batch)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), Qwen2Config(**SMALL, tie_word_embeddings=True)])
def test_training_against_torchs_counter(config, tuning: str) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if tuning == "lora":
        model = add_adapter(model, AdapterSettings(lora_dropout=0.0), seed=0)
    shape, targets = shape_of(model), ROWS * (LENGTH - 1)
    # Eager attention computes both halves of each square, and its backward pass four products, not five.
    eager = 2 * shape.attention * PAIRS * (1 + 2 * 2 - work._ATTENTION_BACKWARD)
    expected = training(shape, TOKENS, PAIRS, targets) + eager
    # The first layer's frozen products have no gradient to hand on: a part of a third of one layer of three.
    assert counted(model.train(), True) == pytest.approx(expected, rel=0.04)


EXPERTS = {"moe_intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16}


@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), Qwen3MoeConfig(**SMALL, **EXPERTS)])
def test_forward_against_torchs_counter(config) -> None:
    config._experts_implementation = "eager"  # a product an expert, which the counter knows
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    shape = shape_of(model)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(ROWS, LENGTH, dtype=torch.long), use_cache=False)
    seen = forward(shape, TOKENS, PAIRS, TOKENS) + 2 * shape.attention * PAIRS  # both halves of each square
    assert counter.get_total_flops() == seen


def test_by_hand() -> None:
    """Six operations a weight and token where all learn, four where none does, as in Kaplan et al. 2020."""
    full = Shape(linear=1000, learnt=1000, adapter=0, head=0, head_learns=False, attention=0)
    assert training(full, 10, 0, 0) == 6 * 1000 * 10
    assert training(full, 10, 0, 0, checkpointing=True) == 8 * 1000 * 10
    frozen = Shape(linear=1000, learnt=0, adapter=50, head=200, head_learns=False, attention=0)
    assert training(frozen, 10, 0, 3) == 4 * 1000 * 10 + 6 * 50 * 10 + 4 * 200 * 3
    assert forward(frozen, 10, 0, 3) == 2 * 1050 * 10 + 2 * 200 * 3
    # One row of 8 tokens, 16 numbers of attention: two products of 8 · 8 · 16, half of them seen.
    assert forward(Shape(0, 0, 0, 0, False, 16), 8, 64, 0) == 2 * 2 * 8 * 8 * 16 / 2


def test_speed_is_measured() -> None:
    assert work.speed_here(64, 32, torch.float32, torch.device("cpu"), seconds=0.01) > 1e6
