"""Models that route tokens to experts, through every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Lfm2MoeConfig, MixtralConfig, Qwen3MoeConfig

from medicalgpt_cli.engine.model.adapters import Targets, target_layers
from medicalgpt_cli.engine.model.experts import expert_weights, experts_a_token, has_experts
from tests.cli import medgpt
from tests.tiny import tiny_model, tiny_tokenizer, write_jsonl

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROUTED = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
# Its first layer has a dense block of the same name as the others' experts.
QWEN = Qwen3MoeConfig(**SIZES, **ROUTED, head_dim=8, mlp_only_layers=[0])
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_which_layers_every_token_passes(tmp_path: Path) -> None:
    for config in (QWEN, MixtralConfig(**SIZES, num_local_experts=4)):
        model = AutoModelForCausalLM.from_config(config)
        assert target_layers(model, ("all",)) == Targets(ATTENTION)
        assert len(expert_weights(model)) == 2 * sum("experts.down" in name for name in expert_weights(model))
    # Its convolutions, whose weights have three dimensions as well, are no experts.
    mixed = Lfm2MoeConfig(**SIZES, **ROUTED, layer_types=["conv", "full_attention", "conv"])
    model = AutoModelForCausalLM.from_config(mixed)
    assert {name.rpartition(".")[2] for name in expert_weights(model)} == {"gate_up_proj", "down_proj"}
    dense = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "dense"))
    assert not has_experts(dense.config) and not expert_weights(dense)


def test_layers_with_numbers_of_experts_of_their_own() -> None:
    own = {index: {"num_experts": 8, "num_experts_per_tok": 1} for index in (0, 2)}
    config = Qwen3MoeConfig(**SIZES, **ROUTED, per_layer_config=own)
    with pytest.raises(RuntimeError):
        _ = config.num_experts_per_tok  # the library refuses to answer for the whole
    assert has_experts(config) and experts_a_token(config) == 2


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = tiny_tokenizer()
    QWEN.vocab_size, QWEN.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(QWEN).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"What about fever {n}?"} for n in range(16)]
    write_jsonl(folder / "prompts.jsonl", rows)
    write_jsonl(folder / "talk.jsonl", [{"question": row["prompt"], "answer": "Rest."} for row in rows])
    write_jsonl(folder / "pairs.jsonl", [{**row, "chosen": "Rest.", "rejected": "no"} for row in rows])
    (folder / "ask.txt").write_text("What about fever?\nWhy?\n", encoding="utf-8")
    return folder


def run(place: Path, stage: str, *flags: object):
    limits = ("--use-cpu", "--max-steps", 2, "--output-dir", place / stage)
    done = medgpt(stage, *limits, *flags)
    assert done.returncode == 0, done.stderr
    return done


def test_every_stage_trains_an_adapter_over_attention(place: Path) -> None:
    base = ("--base-model", place / "model")
    said = run(place, "sft", *base, "--train-data", place / "talk.jsonl").stderr
    assert "experts and their router stay as they are" in said and "plan: " in said
    run(place, "reward", *base, "--train-data", place / "pairs.jsonl")
    sizes = ("--batch-size", 4, "--minibatch-size", 2, "--max-new-tokens", 4)
    trained = ("--lora-model", place / "sft", "--reward-model", place / "reward")
    run(place, "rl", *trained, "--train-data", place / "prompts.jsonl", *sizes)
    for stage in ("sft", "reward", "rl"):
        with safe_open(place / stage / "model" / "adapter_model.safetensors", "pt") as file:
            layers = {name.split(".lora_")[0] for name in set(file.keys()) if ".lora_" in name}
        assert {layer.rpartition(".")[2] for layer in layers} == set(ATTENTION)


def test_experts_are_found_where_processes_share_the_weights(place: Path) -> None:
    pytest.importorskip("deepspeed")
    shared = ("--parallel", "zero3", "--processes", 2, "--train-data", place / "talk.jsonl")
    done = medgpt("sft", "--base-model", place / "model", *shared, "--use-cpu", "--max-steps", 1,
                  "--output-dir", place / "shared")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "experts and their router stay as they are" in done.stderr


def test_an_adapter_is_merged_and_answers_the_same(place: Path) -> None:
    adapter = place / "tuned"
    done = medgpt(
        "sft", "--base-model", place / "model", "--train-data", place / "talk.jsonl", "--use-cpu",
        "--max-steps", 4, "--learning-rate", 0.01, "--output-dir", adapter,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = medgpt("merge-lora", "--lora-model", adapter, "--output-dir", place / "merged")
    assert done.returncode == 0, done.stderr
    answers = []
    for model in (("--lora-model", adapter), ("--base-model", place / "merged")):
        asked = ("--data-file", place / "ask.txt", "--predictions-file", "-", "--max-new-tokens", 6)
        done = medgpt("infer", *model, *asked, "--use-cpu", "--temperature", 0)
        assert done.returncode == 0, done.stderr
        answers.append([json.loads(line)["output"] for line in done.stdout.splitlines()])
    assert answers[0] == answers[1] and len(answers[0]) == 2


def test_all_weights_learn_where_asked(place: Path) -> None:
    run(place, "pretrain", "--base-model", place / "model", "--train-data", place / "ask.txt", "--tuning",
        "full", "--block-size", 16, "--eval-fraction", 0, "--learning-rate", 0.01)  # fmt: skip
    before, after = (
        load_file(folder / "model.safetensors") for folder in (place / "model", place / "pretrain" / "model")
    )
    assert before.keys() == after.keys()
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert any("experts" in name for name in moved) and any("mlp.gate." in name for name in moved)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_bits_that_would_leave_the_experts_as_they_are_are_refused(place: Path, bits: str) -> None:
    asked = ("--data-file", place / "ask.txt", "--predictions-file", "-", f"--load-in-{bits}", "--use-cpu")
    done = medgpt("infer", "--base-model", place / "model", *asked)
    assert (
        done.returncode == 2 and "routes tokens to experts" in done.stderr and "--dtype bf16" in done.stderr
    )


def test_a_plan_counts_all_experts_and_the_work_of_those_at_work(place: Path) -> None:
    flags = ("--base-model", place / "model", "--train-data", place / "talk.jsonl", "--use-cpu", "--json")
    done = medgpt("plan", "sft", *flags, "--throughput", 100, "--tuning", "full")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    weights = load_file(place / "model" / "model.safetensors")
    assert plan["parameters"] == sum(weight.numel() for weight in weights.values())
    assert plan["flops"] < 6 * plan["tokens"] * plan["parameters"]
