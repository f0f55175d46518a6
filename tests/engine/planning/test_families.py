"""Plans of models whose layers differ from one another, beside the real models' own tensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from medicalgpt_cli.engine.planning import rehearsal
from medicalgpt_cli.engine.planning.needs import cache_of
from medicalgpt_cli.engine.planning.rehearsal import Manner, Rows, rehearse
from medicalgpt_cli.engine.planning.skeleton import Outline
from medicalgpt_cli.engine.planning.work import shape_of
from medicalgpt_cli.settings.groups import AdapterSettings
from tests.cli import medgpt
from tests.conftest import DATA
from tests.families import family
from tests.tiny import tiny_tokenizer

# Of each kind: own sizes in some layers and shared keys and values; states; latent attention; experts; a wrapper.
CACHED = [
    "gemma4_text",
    "gemma4",
    "gemma3",
    "gemma3n_text",
    "deepseek_v3",
    "jamba",
    "qwen3_next",
    "falcon_h1",
    "llama",
]


def real(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tensor_bytes(cache: DynamicCache) -> int:
    """What the layers of a cache hold: keys, values, and by number the states that run along a row."""
    found = 0
    for layer in cache.layers:
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        for name in ("conv_states", "recurrent_states"):
            held += (getattr(layer, name, None) or {}).values()
        found += sum(one.numel() * one.element_size() for one in held if one is not None)
    return found


@pytest.mark.parametrize("name", CACHED)
def test_the_cache_is_what_the_model_fills(name: str) -> None:
    """Two rows of 20 prompt tokens and 10 of an answer; a window forgets what it no longer sees."""
    config = family(name)
    model = real(config)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(2, 30, dtype=torch.long), past_key_values=cache, use_cache=True)
    found = cache_of(Outline(config, torch.float32), Rows((20, 15), 0, True), 10).total
    assert found == tensor_bytes(cache) > 0


ATTENTION = {
    # Four heads of 16 in the two layers with a window, of 32 in the other two.
    "gemma4_text": 2 * 4 * 16 + 2 * 4 * 32,
    "llama": 4 * 4 * 16,
    "jamba": 2 * 4 * 16,  # every second layer has attention
    "lfm2": 2 * 4 * 16,
    "falcon_h1": 4 * 4 * 16,  # beside the state in every layer
    "nemotron_h": 1 * 4 * 16,
    "zamba2": 2 * 4 * 32,
    "mamba": 0,
    # Scores of 16 + 8 numbers a head, and values of 16: as two products of 20.
    "deepseek_v3": 4 * 4 * 20,
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_by_hand(name: str) -> None:
    assert shape_of(real(family(name))).attention == ATTENTION[name]


@pytest.mark.parametrize("name", ["gemma4_text", "deepseek_v3", "lfm2"])
def test_attention_against_torchs_counter(name: str) -> None:
    """What grows with the square of the length: the second difference of the operations of three lengths."""
    model = real(family(name, attn_implementation="eager", sliding_window=512))
    flops = []
    for length in (16, 32, 48):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=False)
        flops.append(counter.get_total_flops())
    squared = (flops[2] - 2 * flops[1] + flops[0]) / (2 * 16**2)
    assert squared == 4 * shape_of(model).attention  # two products, both halves of the square


def test_what_a_wrapper_sees_with_is_no_work_of_text() -> None:
    with_eyes, text = real(family("gemma3")), real(family("gemma3_text"))
    assert shape_of(with_eyes) == shape_of(text)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("glm4_moe", {"num_hidden_layers": 9, "first_k_dense_replace": 3}),  # dense ones first
        ("gemma4_text", {"num_hidden_layers": 12, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 4,
                         "num_kv_shared_layers": 0}),
        ("jamba", {"num_hidden_layers": 9, "attn_layer_period": 4, "attn_layer_offset": 3}),
        ("gemma4_text", {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}),
    ],
)  # fmt: skip
def test_short_models_stand_for_layers_of_several_kinds(name: str, more: dict, monkeypatch) -> None:
    plan = Outline(family(name, **more), torch.float32, tuning=AdapterSettings())
    rows, manner = Rows((12, 9), 18), Manner("next token")
    found = rehearse(plan, rows, manner)
    monkeypatch.setattr(rehearsal, "_LONG", 100)
    whole = rehearse(dataclasses.replace(plan), rows, manner)
    assert found.kept == pytest.approx(whole.kept, rel=0.01)
    assert found.peak == pytest.approx(whole.peak, rel=0.01)


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gemma4") / "model"
    tokenizer = tiny_tokenizer()
    real(family("gemma4", eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_gemma_4_is_planned_and_trained(gemma4: Path, tmp_path: Path) -> None:
    flags = ("sft", "--base-model", gemma4, "--train-data", DATA / "medquad_en_alpaca.jsonl", "--use-cpu")
    flags = (*flags, "--max-length", 64, "--batch-size", 2, "--max-steps", 2, "--eval-fraction", 0)
    done = medgpt("plan", *flags, "--throughput", 1000, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory"]["peak"] > 0
    done = medgpt(*flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 0 and "plan: " in done.stderr, done.stderr
