"""Base weights in 8 and 4 bits: against the same weights written out in full, and through every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medicalgpt_cli.engine.model.adapters import add_adapter
from medicalgpt_cli.engine.model.loading import load_model
from medicalgpt_cli.engine.model.quantization import count_parameters
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.settings.groups import AdapterSettings
from medicalgpt_cli.settings.stages import InferSettings, SftSettings
from tests.cli import medgpt
from tests.tiny import tiny_model, write_jsonl

BITS = ("4bit", "8bit")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bits")
    tiny_model(folder / "model", seed=2)
    words = ["fever", "cough", "头痛", "diet"]
    rows = [{"prompt": f"What about {word} {n}?"} for n in range(6) for word in words]
    write_jsonl(folder / "prompts.jsonl", rows)
    write_jsonl(
        folder / "talk.jsonl", [{"question": row["prompt"], "answer": "Rest and drink."} for row in rows]
    )
    write_jsonl(folder / "text.jsonl", [{"text": row["prompt"] * 6} for row in rows])
    pairs = [{**row, "chosen": "Please rest. " * 2, "rejected": f"no {n}"} for n, row in enumerate(rows)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    (folder / "ask.txt").write_text("What about fever?\nWhy?\n", encoding="utf-8")
    return folder


def quantised(place: Path, bits: str, **more):
    settings = SftSettings(
        base_model=str(place / "model"), train_data=("x",), use_cpu=True, **{f"load_in_{bits}": True}, **more
    )
    return load_model(settings, resolve_models(settings), trainable=True)


def in_full(place: Path, model) -> torch.nn.Module:
    """The same model with its quantised weights written out as fp32, worked out from what is stored."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    plain = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    count = 0
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, Linear8bitLt):
            scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            weight = layer.weight.data.float() * scale.float()[:, None] / 127
        else:
            continue
        plain.get_submodule(name).weight.data = weight.float()
        count += 1
    assert count == 7 * model.config.num_hidden_layers  # every linear layer but the head
    return plain


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_same_weights_in_full_also_after_a_measurement(
    place: Path, bits: str
) -> None:
    model = quantised(place, bits)
    plain = in_full(place, model)
    start = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert count_parameters(model) == count_parameters(start)
    ids = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(1))
    found = []
    for one in (model, plain):
        tuned = add_adapter(one, AdapterSettings(lora_dropout=0.0), seed=1)
        tuned.eval()
        with torch.no_grad():  # bitsandbytes may lay the weights out anew here
            tuned(input_ids=ids)
        tuned.train()
        tuned(input_ids=ids, labels=ids).loss.backward()
        found.append(
            {name: weight.grad for name, weight in tuned.named_parameters() if weight.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    size = max(float(gradient.abs().max()) for gradient in found[1].values())
    # int8 rounds the activations, too, token by token
    allowed = {"4bit": 1e-5, "8bit": 0.03}[bits] * size
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=allowed), name
    assert size > 0


def run(place: Path, *arguments: object) -> dict:
    done = medgpt(*arguments, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_stage_over_four_bits_and_merged_onto_the_full_weights(place: Path) -> None:
    quick = ("--load-in-4bit", "--max-steps", "2", "--batch-size", "4", "--learning-rate", "0.01")
    base = ("--base-model", "model")
    run(
        place,
        "pretrain",
        *base,
        "--train-data",
        "text.jsonl",
        "--block-size",
        "32",
        *quick,
        "--output-dir",
        "p",
    )
    run(place, "sft", "--lora-model", "p", "--train-data", "talk.jsonl", *quick, "--output-dir", "s")
    run(place, "reward", "--lora-model", "s", "--train-data", "pairs.jsonl", *quick, "--output-dir", "r")
    more = ("--minibatch-size", "4", "--max-new-tokens", "4", "--eval-fraction", "0.2", "--output-dir", "l")
    run(
        place,
        "rl",
        *("--lora-model", "s", "--reward-model", "r", "--train-data", "prompts.jsonl"),
        *quick,
        *more,
    )
    assert json.loads((place / "l/run.json").read_text())["settings"]["load_in_4bit"]["value"] is True
    run(place, "merge-lora", "--lora-model", "l", "--output-dir", "merged")
    merged, start = (load_file(place / name / "model.safetensors") for name in ("merged", "model"))
    adapter = load_file(place / "l/model/adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    by_hand = start[f"{name}.weight"].float() + 2.0 * b @ a  # alpha / rank = 16 / 8
    assert torch.allclose(merged[f"{name}.weight"].float(), by_hand, atol=1e-6)
    assert not torch.equal(by_hand, start[f"{name}.weight"].float())


@pytest.mark.parametrize("bits", BITS)
def test_answers_are_those_of_the_library(place: Path, bits: str) -> None:
    ask = ("--data-file", "ask.txt", "--predictions-file", "-", "--max-new-tokens", "12", "--with-prompt")
    done = medgpt("infer", "--base-model", "model", f"--load-in-{bits}", "--batch-size", "1", *ask, cwd=place)
    assert done.returncode == 0, done.stderr
    ours = [json.loads(line)["output"] for line in done.stdout.splitlines()]
    settings = InferSettings(
        base_model=str(place / "model"),
        data_file="x",
        predictions_file="x.json",
        use_cpu=True,
        **{f"load_in_{bits}": True},
    )
    model = load_model(settings, resolve_models(settings))
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    for question, answer in zip(("What about fever?", "Why?"), ours, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
            return_tensors="pt",
        )
        out = model.generate(
            ids, max_new_tokens=12, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids)
        )
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).rstrip("\ufffd") == answer


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("sft", "--load-in-4bit", "--load-in-8bit"), "contradict each other"),
        (("sft", "--load-in-4bit", "--tuning", "full"), "cannot be trained"),
        (("pretrain", "--load-in-8bit", "--from-config", "model/config.json"), "--load-in-8bit"),
        (("sft", "--optimizer", "paged-adamw"), "needs a GPU"),
    ],
)
def test_what_cannot_be_is_said_first(place: Path, flags: tuple[str, ...], word: str) -> None:
    done = medgpt(
        *flags, "--tokenizer-path", "model", "--use-cpu", "--train-data", "talk.jsonl", "--dry-run", cwd=place
    )
    assert done.returncode == 2, done.stderr
    assert word in done.stderr and "hint:" in done.stderr


def test_a_resume_with_other_bits_is_refused(place: Path) -> None:
    flags = ("sft", "--base-model", "model", "--train-data", "talk.jsonl", "--batch-size", "4")
    run(place, *flags, "--load-in-8bit", "--max-steps", "2", "--output-dir", "eight")
    manifest = json.loads((place / "eight/run.json").read_text())
    (place / "eight/run.json").write_text(json.dumps({**manifest, "status": "stopped"}))
    done = medgpt("sft", "--resume", "eight", "--load-in-4bit", cwd=place)
    assert done.returncode == 2 and "--load-in" in done.stderr, done.stderr
