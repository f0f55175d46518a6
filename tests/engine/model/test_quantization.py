"""Base weights in 8 and 4 bits: against the same weights written out in full, and through every stage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from medicalgpt_cli.engine.model.adapters import add_adapter
from medicalgpt_cli.engine.model.loading import load_model
from medicalgpt_cli.engine.model.quantization import count_parameters
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.training.attention import is_exact
from medicalgpt_cli.settings.groups import AdapterSettings, ModelSettings
from medicalgpt_cli.settings.stages import SftSettings
from tests.cli import ROOT, environment, medgpt
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
    write_jsonl(folder / "held.jsonl", [{"question": "Why fever?", "answer": "Drink and rest."}])
    write_jsonl(folder / "text.jsonl", [{"text": row["prompt"] * 6} for row in rows])
    pairs = [{**row, "chosen": "Please rest. " * 2, "rejected": f"no {n}"} for n, row in enumerate(rows)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    (folder / "some.gguf").touch()
    (folder / "ask.txt").write_text("What about fever?\nWhy?\n", encoding="utf-8")
    return folder


def quantised(place: Path, bits: str, **more):
    settings = SftSettings(
        base_model=str(place / "model"), train_data=("x",), use_cpu=True, **{f"load_in_{bits}": True}, **more
    )
    return load_model(settings, resolve_models(settings), trainable=True)


def by_the_libraries(place: Path, bits: str):
    """transformers and bitsandbytes alone.

    In training mode, since that for evaluation has bfloat16 for 4 bits and rounds activations for 8; the tiny model
    has no dropout, so there is no other difference.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        place / "model", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    ).train()


def in_full(place: Path, model) -> torch.nn.Module:
    """The same model with its quantised weights written out as fp32, worked out from what is stored."""
    from bitsandbytes.functional import dequantize_4bit

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
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5 * size), name
    assert size > 0


@pytest.mark.parametrize("bits", BITS)
def test_a_text_gets_the_same_logits_in_any_company_and_in_either_mode(place: Path, bits: str) -> None:
    """bitsandbytes' own kernels for evaluation on a processor fail this."""
    model = quantised(place, bits)
    rows = torch.randint(0, 200, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.get_input_embeddings().weight[rows[1, 0], 3] = 40.0  # an outlier in the company
        together, alone, training = (
            model.eval()(rows).logits[0],
            model.eval()(rows[:1]).logits[0],
            model.train()(rows[:1]).logits[0],
        )
        assert is_exact(model.eval())
    assert torch.allclose(alone, training, atol=1e-5)
    assert torch.allclose(alone, together, atol=1e-4)


def run(place: Path, *arguments: object) -> dict:
    done = medgpt(*arguments, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_stage_over_four_bits_and_merged_onto_the_full_weights(place: Path) -> None:
    quick = ("--load-in-4bit", "--max-steps", "2", "--batch-size", "4", "--learning-rate", "0.01")
    base = ("--base-model", "model")
    text = ("--train-data", "text.jsonl", "--block-size", "32")
    run(place, "pretrain", *base, *text, *quick, "--output-dir", "p")
    talk = ("--train-data", "talk.jsonl", "--eval-data", "held.jsonl", "--eval-answer-tokens", "4")
    tuned = run(place, "sft", "--lora-model", "p", *talk, *quick, "--output-dir", "s")
    assert tuned["after"]["loss"] == pytest.approx(by_hand_loss(place, "s"), abs=1e-4)
    run(place, "reward", "--lora-model", "s", "--train-data", "pairs.jsonl", *quick, "--output-dir", "r")
    more = ("--minibatch-size", "4", "--max-new-tokens", "4", "--eval-fraction", "0.2", "--output-dir", "l")
    more += ("--optimizer", "adamw-8bit", "--save-steps", "1")
    run(
        place,
        "rl",
        *("--lora-model", "s", "--reward-model", "r", "--train-data", "prompts.jsonl"),
        *quick,
        *more,
    )
    assert json.loads((place / "l/run.json").read_text())["settings"]["load_in_4bit"]["value"] is True
    state = torch.load(place / "l/checkpoints/checkpoint-2/optimizer.pt", weights_only=True)["state"]
    assert {"state1", "state2"} <= moments_of(state[0]).keys()  # in torch: exp_avg and exp_avg_sq
    run(place, "merge-lora", "--lora-model", "l", "--output-dir", "merged")
    merged, start = (load_file(place / name / "model.safetensors") for name in ("merged", "model"))
    adapter = load_file(place / "l/model/adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    by_hand = start[f"{name}.weight"].float() + 2.0 * b @ a  # alpha / rank = 16 / 8
    assert torch.allclose(merged[f"{name}.weight"].float(), by_hand, atol=1e-6)
    assert not torch.equal(by_hand, start[f"{name}.weight"].float())


def moments_of(state: dict) -> dict:
    """What bitsandbytes' optimizer remembers of a weight."""
    return state["__bnb_optimizer_quant_state__"]


def by_hand_loss(place: Path, adapter: str) -> float:
    """The held-out loss of an adapter over 4 bits by transformers, bitsandbytes and peft alone, row by row."""
    model = PeftModel.from_pretrained(by_the_libraries(place, "4bit"), place / adapter / "model")
    for module in model.modules():
        module.training = isinstance(module, Linear4bit)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    total, count = 0.0, 0
    for line in (place / "held.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        target = [*tokenizer.encode(row["answer"]), tokenizer.eos_token_id]
        ids = torch.tensor([prompt + target])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        count += len(target)
    return total / count


@pytest.mark.parametrize("bits", BITS)
def test_answers_are_those_of_the_library(place: Path, bits: str) -> None:
    ask = ("--data-file", "ask.txt", "--predictions-file", "-", "--max-new-tokens", "12", "--with-prompt")
    done = medgpt("infer", "--base-model", "model", f"--load-in-{bits}", "--batch-size", "1", *ask, cwd=place)
    assert done.returncode == 0, done.stderr
    ours = [json.loads(line)["output"] for line in done.stdout.splitlines()]
    model = by_the_libraries(place, bits)
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


def test_a_folder_that_is_quantised_already_is_taken_as_it_is(place: Path) -> None:
    model = by_the_libraries(place, "4bit")
    model.save_pretrained(place / "stored")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(place / "stored")
    settings = ModelSettings(base_model=str(place / "stored"), use_cpu=True)
    loaded = load_model(settings, resolve_models(settings))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    for flags, word in (
        (("--load-in-8bit",), "quantised already (bitsandbytes)"),
        (("--tuning", "full"), "cannot be trained themselves"),
    ):
        done = medgpt(
            "sft", "--base-model", "stored", *flags, "--train-data", "talk.jsonl", "--dry-run", cwd=place
        )
        assert done.returncode == 2 and word in done.stderr and "hint:" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("sft", "--load-in-4bit", "--load-in-8bit"), "contradict each other"),
        (("sft", "--load-in-4bit", "--tuning", "full"), "cannot be trained"),
        (("pretrain", "--load-in-8bit", "--from-config", "model/config.json"), "--load-in-8bit"),
        (("sft", "--load-in-8bit", "--dora"), "wrongly over 8 bits"),
        (("sft", "--optimizer", "paged-adamw"), "needs a GPU"),
        (("sft", "--load-in-4bit", "--base-model", "some.gguf"), "is a GGUF file"),
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
    run(place, *flags, "--load-in-8bit", "--max-steps", "1", "--output-dir", "eight")
    manifest = json.loads((place / "eight/run.json").read_text()) | {"status": "stopped"}
    (place / "eight/run.json").write_text(json.dumps(manifest))
    done = medgpt("sft", "--resume", "eight", "--load-in-4bit", cwd=place)
    assert done.returncode == 2 and "--load-in" in done.stderr, done.stderr
    del manifest["settings"]["load_in_8bit"]  # a run from before there was the option
    (place / "eight/run.json").write_text(json.dumps(manifest))
    done = medgpt("sft", "--resume", "eight", "--load-in-8bit", cwd=place)
    assert done.returncode == 2 and "--load-in-8bit False → True" in done.stderr, done.stderr


def test_no_compiled_code_is_fetched(tmp_path: Path) -> None:
    """Where the package `kernels` is installed, bitsandbytes would have it fetch some from the hub."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("raise SystemExit('fetched')\n")
    code = "from medicalgpt_cli.engine.run.quiet import quieten; quieten(); import bitsandbytes"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment({"PYTHONPATH": f"{ROOT}:{tmp_path}"}),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "more"),
    [
        ("4bit", ("--dora",)),
        *[
            (bits, more)
            for bits in BITS
            for more in (("--embeddings", "all"), ("--gradient-checkpointing",), ("--layout", "padded"))
        ],
    ],
)
def test_what_goes_with_few_bits(place: Path, bits: str, more: tuple[str, ...]) -> None:
    flags = ("sft", "--base-model", "model", "--train-data", "talk.jsonl", "--batch-size", "4")
    quick = (f"--load-in-{bits}", "--learning-rate", "0.01", "--eval-fraction", "0.2")
    name = bits + more[0]
    result = run(place, *flags, *quick, "--max-steps", "10", *more, "--output-dir", name)
    assert result["after"]["loss"] < result["before"]["loss"] - 0.1
    merged = run(place, "merge-lora", "--lora-model", name, "--output-dir", f"{name}-merged")
    assert merged["in_memory"] <= 1e-4


@pytest.mark.slow
def test_a_run_over_four_bits_with_moments_in_eight_goes_on_to_the_same_weights(place: Path) -> None:
    flags = ("sft", "--base-model", "model", "--train-data", "talk.jsonl", "--batch-size", "4")
    bits = ("--load-in-4bit", "--optimizer", "adamw-8bit", "--lora-rank", "64", "--save-steps", "2")
    run(place, *flags, *bits, "--max-steps", "4", "--output-dir", "whole")
    shutil.copytree(place / "whole", place / "cut")
    shutil.rmtree(place / "cut/model")
    shutil.rmtree(place / "cut/checkpoints/checkpoint-4")
    manifest = json.loads((place / "cut/run.json").read_text())
    (place / "cut/run.json").write_text(json.dumps({**manifest, "status": "stopped"}))
    state = torch.load(place / "cut/checkpoints/checkpoint-2/optimizer.pt", weights_only=True)["state"]
    assert any(moments_of(one)["state1"].dtype == torch.uint8 for one in state.values())
    run(place, "sft", "--resume", "cut")
    ours, theirs = (load_file(place / name / "model/adapter_model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
