"""--attention, --liger, --compile and --fp8: refused with a reason, or the same losses as without.

The tests that need a GPU say so and are skipped without one: `pytest -m slow tests/engine/training/test_speed.py`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.model.loading import read_config
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.training import attention, speed
from medicalgpt_cli.engine.training.batches import end_to_end, padded
from medicalgpt_cli.engine.training.losses import target_loss
from medicalgpt_cli.settings.stages import SftSettings
from tests.cli import medgpt
from tests.tiny import tiny_model, write_jsonl

HAS_GPU = torch.cuda.is_available()
RUN = ("--max-steps", "6", "--learning-rate", "0.005", "--eval-fraction", "0.2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    tiny_model(folder / "model", seed=4)
    no_weights = tiny_model(folder / "no-weights", seed=4)
    (no_weights / "model.safetensors").unlink()
    words = ["fever", "cough", "头痛", "diet", "rest"]
    rows = [
        {"question": f"What about {word} {n}?", "answer": "Rest. " * (1 + n)}
        for n in range(5)
        for word in words
    ]
    write_jsonl(folder / "talk.jsonl", rows)
    write_jsonl(folder / "text.jsonl", [{"text": row["question"] * 9} for row in rows])
    pairs = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": f"no {n}"}
        for n, row in enumerate(rows)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


FULL = ("--tuning", "full")


@pytest.mark.skipif(HAS_GPU, reason="what is refused on a machine without a GPU")
@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (("--attention", "flash2"), 3, "needs a GPU"),
        (("--attention", "flash3"), 3, "needs a GPU"),
        (("--attention", "flash2", "--dtype", "fp32"), 2, "not in fp32"),
        (("--attention", "flash9"), 2, "not one of"),
        (("--liger",), 3, "needs a GPU"),
        (("--fp8",), 2, "--tuning full"),
        (("--fp8", *FULL), 3, "needs a GPU"),
        (("--fp8", *FULL, "--dtype", "fp16"), 2, "bf16"),
        (("--compile", "--load-in-4bit"), 2, "--load-in-4bit"),
        (("--compile", "--gradient-checkpointing"), 2, "--gradient-checkpointing"),
    ],
)
def test_what_cannot_work_is_refused_before_a_weight_is_read(place: Path, flags, code: int, word: str):
    """The model's folder has no weights: reading them would be another error."""
    done = medgpt("sft", "--base-model", "no-weights", "--train-data", "talk.jsonl", *flags, cwd=place)
    assert done.returncode == code and word in done.stderr, done.stderr
    assert done.stderr.count("error:") == done.stderr.count("hint:") == 1 and "Traceback" not in done.stderr
    assert not (place / "runs").exists()


def test_compiling_wants_a_compiler(place: Path):
    done = medgpt(
        *("sft", "--base-model", "no-weights", "--train-data", "talk.jsonl", "--compile", "--use-cpu"),
        cwd=place,
        env={"PATH": "/nowhere"},
    )
    assert done.returncode == 3 and "C++ compiler" in done.stderr, done.stderr


def test_rl_has_none_of_them(place: Path):
    for flag in ("--compile", "--liger", "--fp8", "--attention"):
        done = medgpt("rl", "--base-model", "no-weights", "--train-data", "talk.jsonl", flag, cwd=place)
        assert done.returncode == 2 and "option" in done.stderr and flag in done.stderr, done.stderr


def model_of(place: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place / "model", dtype=dtype).to(device).train()


EXAMPLES = [
    Example(list(range(5, 5 + n)), [-100] * 2 + list(range(7, 5 + n)), at="here") for n in (9, 30, 14, 21)
]


def loss_and_gradient(model, padding_free: bool) -> tuple[float, torch.Tensor]:
    batch = end_to_end(EXAMPLES) if padding_free else padded(EXAMPLES, 0)
    model.zero_grad()
    with attention.for_batches(model, padding_free):
        loss = target_loss(model, {name: value.to(model.device) for name, value in batch.items()})
        loss.backward()
    return float(loss.detach()), model.get_input_embeddings().weight.grad.clone()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_free", [True, False])
def test_a_chosen_attention_computes_the_same(place: Path, implementation: str, padding_free: bool):
    model = model_of(place)
    loss, gradient = loss_and_gradient(model, padding_free)
    assert attention.borrows_prefixes(model)
    attention.choose(model, implementation, torch.float32)
    assert attention.is_exact(model) and not attention.borrows_prefixes(model)
    with attention.for_batches(model, padding_free):
        assert model.config._attn_implementation == implementation
    found, other = loss_and_gradient(model, padding_free)
    assert found == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(gradient, other, atol=1e-3)
    assert model.config._attn_implementation == "sdpa"  # what answers is as it was


def settings(place: Path, **more) -> SftSettings:
    return SftSettings(base_model=str(place / "model"), train_data=("talk.jsonl",), **more)


@pytest.mark.slow
def test_compiled_layers_learn_the_same(place: Path):
    """Both layouts, really compiled; outside, nothing is, and weights keep their names."""
    from torch._dynamo.utils import counters

    model = model_of(place)
    names = list(model.state_dict())
    for padding_free in (True, False):
        loss, gradient = loss_and_gradient(model, padding_free)
        with speed.compiled(model, settings(place, compile=True, use_cpu=True)):
            assert list(model.state_dict()) == names
            before = counters["stats"]["unique_graphs"]
            found, other = loss_and_gradient(model, padding_free)
        assert before < counters["stats"]["unique_graphs"] <= before + 4  # layers share them
        assert found == pytest.approx(loss, rel=1e-6)
        assert torch.allclose(gradient, other, atol=1e-3)
    assert not any("forward" in vars(module) for module in model.modules())


def curve(place: Path, run: str, *arguments: object) -> list[float]:
    done = medgpt(*arguments, *RUN, "--output-dir", run, cwd=place, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (place / run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "data", "flags"),
    [
        ("sft", "talk.jsonl", ()),
        ("sft", "talk.jsonl", ("--layout", "padded", *FULL)),
        ("pretrain", "text.jsonl", ("--block-size", "32")),
        ("reward", "pairs.jsonl", ()),
    ],
)
def test_a_compiled_run_is_the_same_run(place: Path, stage: str, data: str, flags: tuple[str, ...]):
    """Losses within 1e-4, dropout included, and ordinary names in `model/` and in the checkpoints."""
    from safetensors import safe_open

    run = f"{stage}-{len(flags)}"
    base = (stage, "--base-model", "model", "--train-data", data, "--use-cpu", *flags)
    plain, fast = curve(place, run, *base), curve(place, f"{run}-compiled", *base, "--compile")
    assert len(plain) == 6 and fast == pytest.approx(plain, abs=1e-4)
    for folder in (f"{run}-compiled/model", f"{run}-compiled/checkpoints/checkpoint-6"):
        kept = {}
        for which in (folder, folder.replace("-compiled", "")):
            (file,) = (place / which).glob("*model.safetensors")
            with safe_open(file, "pt") as weights:
                kept[which] = set(weights.keys())
        assert len(set(map(frozenset, kept.values()))) == 1


@pytest.mark.slow
def test_products_in_eight_bits_learn_almost_the_same(place: Path):
    """The same computation written out, which any processor can do."""
    pytest.importorskip("torchao", reason="--fp8 needs torchao")
    model = model_of(place)
    loss, _ = loss_and_gradient(model, True)
    names = list(model.state_dict())
    assert speed.use_fp8(model, emulate=True) == 2 * 7
    assert list(model.state_dict()) == names and type(model.lm_head) is torch.nn.Linear
    found, gradient = loss_and_gradient(model, True)
    assert found != loss and found == pytest.approx(loss, rel=0.05)
    assert torch.isfinite(gradient).all()


@pytest.mark.slow
def test_liger_knows_the_usual_models(place: Path):
    pytest.importorskip("liger_kernel", reason="--liger needs liger-kernel")
    pytest.importorskip("triton", reason="liger-kernel needs triton")
    assert {"llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"} <= speed._liger().types


# -- on a GPU ----------------------------------------------------------------------------------------------


def on_a_gpu(least: tuple[int, int], package: str | None = None) -> None:
    if not HAS_GPU:
        pytest.skip("needs a GPU")
    if torch.cuda.get_device_capability() < least:
        pytest.skip(f"needs a GPU of compute capability {least}")
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "least", "package"),
    [
        (("--dtype", "bf16"), (8, 0), None),
        (("--attention", "flash2"), (8, 0), "flash_attn"),
        (("--attention", "flash3"), (9, 0), "flash_attn_interface"),
        (("--attention", "flash2", "--layout", "padded"), (8, 0), "flash_attn"),
        (("--attention", "flash2", *FULL), (8, 0), "flash_attn"),
        (("--liger",), (8, 0), "liger_kernel"),
        (("--compile",), (8, 0), "triton"),
        (("--compile", "--liger", "--attention", "flash2"), (8, 0), "flash_attn"),
        (("--fp8", *FULL), (8, 9), "torchao"),
        (("--fp8", "--compile", *FULL), (8, 9), "torchao"),
    ],
)
@pytest.mark.parametrize(("stage", "data"), [("sft", "talk.jsonl"), ("reward", "pairs.jsonl")])
def test_on_a_gpu_the_losses_are_those_of_sdpa(place: Path, stage: str, data: str, flags, least, package):
    """Each flag against torch's own attention and kernels, all in bf16: within what bf16 rounds (fp8: its own)."""
    on_a_gpu(least, package)
    full = FULL if "full" in flags else ()
    base = (stage, "--base-model", "model", "--train-data", data, "--lora-dropout", "0")
    base = base if not full else base[:-2]
    plain = curve(place, f"gpu-{stage}-sdpa-{len(full)}", *base, *full, "--attention", "sdpa")
    run = "-".join(one.strip("-") for one in flags)
    assert curve(place, f"gpu-{stage}-{run}", *base, *flags) == pytest.approx(
        plain, rel=0.1 if "--fp8" in flags else 0.02
    )


@pytest.mark.slow
def test_what_a_gpu_lacks_is_refused(place: Path):
    if not HAS_GPU or torch.cuda.get_device_capability() >= (8, 0):
        pytest.skip("needs an old GPU")
    base = ("sft", "--base-model", "no-weights", "--train-data", "talk.jsonl")
    for flags in (("--dtype", "bf16"), ("--attention", "flash2"), ("--fp8", *FULL)):
        done = medgpt(*base, *flags, cwd=place)
        assert done.returncode == 3 and "hint:" in done.stderr, done.stderr


def test_the_model_type_is_read_without_weights(place: Path):
    resolved = resolve_models(SftSettings(base_model=str(place / "no-weights"), train_data=("x",)))
    assert read_config(resolved).model_type == "llama"
