"""Formulas by hand, and published figures of large models beside ours."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig

from medicalgpt_cli.engine.planning.batches import Item
from medicalgpt_cli.engine.planning.device import CUDA_CONTEXT
from medicalgpt_cli.engine.planning.memory import States, exchange_bytes, sharded, step_bytes
from medicalgpt_cli.engine.planning.needs import Case, Roles, cache_of, largest_batch, needs
from medicalgpt_cli.engine.planning.rehearsal import Rows
from medicalgpt_cli.engine.planning.skeleton import Outline
from medicalgpt_cli.settings.groups import AdapterSettings
from tests.engine.planning.configs import llama, qwen_7b

GB = 10**9


def test_zero_as_in_its_paper() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5e9 weights, 64 devices, mixed precision (2 + 2 + 12 bytes a weight)."""
    states = States(frozen=0, weights=15 * GB, gradients=15 * GB, moments=90 * GB)
    assert sharded(states, "ddp", 64).total == 120 * GB
    assert sharded(states, "zero2", 64).total / GB == pytest.approx(16.6, abs=0.05)
    assert sharded(states, "zero3", 64).total / GB == pytest.approx(1.9, abs=0.05)


def test_shares_by_hand() -> None:
    states = States(frozen=1000, weights=400, gradients=400, moments=800)
    assert sharded(states, "zero2", 4) == States(1000, 400, 100, 200)
    assert sharded(states, "fsdp", 4) == States(250, 100, 100, 200)
    assert sharded(states, "ddp", 4) == states


def test_what_an_update_needs_by_hand() -> None:
    """Roots of a tensor's second moments: with ZeRO a share is one tensor, and a processor makes two of them."""
    assert step_bytes(100, "ddp", on_gpu=False) == 0
    assert step_bytes(100, "zero2", on_gpu=False) == 800
    assert step_bytes(100, "ddp", on_gpu=True) == step_bytes(100, "zero3", on_gpu=True) == 400


def test_what_is_gathered_by_hand() -> None:
    """4 devices, 16 bits: three quarters of what is there whole are the others'."""
    billion = 10**9
    small, large = (400, 50, 40), (8 * billion, billion // 10, billion // 2)
    assert exchange_bytes(*small, 2, "ddp", 4) == exchange_bytes(*small, 2, "zero3", 1) == 0
    assert exchange_bytes(*small, 2, "fsdp", 4) == 2 * (140 - 35)
    assert exchange_bytes(*small, 2, "zero3", 4) == 2 * (400 - 100)  # all of it is needed again soon
    assert exchange_bytes(*large, 2, "fsdp", 4) == 2 * (700 - 175) * 10**6
    assert exchange_bytes(*large, 2, "zero3", 4) == 2 * (1200 - 300) * 10**6


def test_a_cache_by_hand() -> None:
    """Llama 2 70B, 4,096 positions in 16 bits: 2 · 80 layers · 8 heads · 128 · 4,096 · 2 bytes."""
    found = cache_of(Outline(llama("70B"), torch.bfloat16), Rows((4096,), 0, True), 0)
    assert found.total == 1_342_177_280


def case(config, tokens: int = 1024, rows: int = 1, tuning: str = "lora", bits=None, **more) -> Case:
    full = tuning == "full"
    settings = AdapterSettings(tuning=tuning)
    dtype = torch.float32 if full else torch.bfloat16
    items = [Item((tokens,), tokens)] * 500
    return Case(
        Outline(config, dtype, tuning=settings, quantization=bits),
        Rows((tokens,) * rows, rows * tokens),
        items,
        on_gpu=True,
        autocast=torch.bfloat16,
        program=CUDA_CONTEXT,
        batch_size=rows,
        **more,
    )


# LLaMA-Factory's README, "Hardware Requirement", in GB, said there to be estimates: (model, tuning, bits, figure).
LLAMA_FACTORY = [
    ("7B", "full", None, 120), ("13B", "full", None, 240), ("70B", "full", None, 1200),
    ("7B", "lora", None, 16), ("13B", "lora", None, 32), ("70B", "lora", None, 160),
    ("7B", "lora", "8bit", 10), ("13B", "lora", "8bit", 20), ("70B", "lora", "8bit", 80),
    ("7B", "lora", "4bit", 6), ("13B", "lora", "4bit", 12), ("70B", "lora", "4bit", 48),
]  # fmt: skip


@pytest.mark.parametrize(("size", "tuning", "bits", "published"), LLAMA_FACTORY)
def test_beside_llama_factory(size: str, tuning: str, bits: str | None, published: float) -> None:
    """One row of 1,024 tokens with recomputation. Their figures are round."""
    found = needs(case(llama(size), tuning=tuning, bits=bits, checkpointing=True))["peak"] / GB
    assert found == pytest.approx(published, rel=0.35)


def test_beside_qlora() -> None:
    """Dettmers et al. 2023: 65B on one GPU of 48 GB, 33B on one of 24 GB, 7B in 5 GB (section 1 and table 6)."""
    found = {
        size: needs(case(llama(size), tokens=512, bits="4bit", checkpointing=True))["peak"] / GB
        for size in ("7B", "33B", "65B")
    }
    assert 32 < found["65B"] < 48 and 16 < found["33B"] < 24 and 3.5 < found["7B"] < 6


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    small = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4)
    start = case(small, tokens=300, rows=2)
    seven, eight = (needs(start.with_batch(number))["peak"] for number in (7, 8))
    assert seven < eight
    assert largest_batch(start, (seven + eight) // 2) == 7
    assert largest_batch(start, start.program) is None


def test_four_roles_over_one_base_by_hand() -> None:
    plain = case(qwen_7b())
    drawn = Rows((100,) * 4, 0, True)
    roles = Roles(True, adapters=4, apart=None, drawn=drawn, new_tokens=100)
    rl = dataclasses.replace(plain, stage="rl", roles=roles)
    adapter = plain.parameters.adapter_bytes
    assert rl.states.frozen == plain.states.frozen + 2 * adapter  # reference and reward
    assert rl.states.weights == 2 * adapter == rl.states.gradients  # policy and value
    assert rl.states.moments == 4 * adapter
    assert rl.cache == 2 * 28 * 4 * 128 * (4 * 200) * 2
