"""merge-lora: the merged model is base + adapter, on disk, and never in place of something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from medicalgpt_cli.engine.model import merging
from medicalgpt_cli.engine.model.loading import load_model
from medicalgpt_cli.engine.model.merging import TOLERANCE, merge
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import MedgptError, UsageError
from medicalgpt_cli.settings.groups import ModelSettings
from medicalgpt_cli.settings.stages import MergeLoraSettings
from tests.cli import medgpt
from tests.engine.model.test_loading import adapter_over
from tests.tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9, 300]])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "base")
    adapter_over(tmp_path / "base", tmp_path / "adapter")
    return tmp_path


def merged_into(place: Path, adapter: str = "adapter", **options) -> dict:
    options = {"output_dir": place / "merged", "use_cpu": True, **options}
    return merge(MergeLoraSettings(lora_model=str(place / adapter), **options), Observer())


def with_adapter(place: Path, adapter: str = "adapter") -> torch.Tensor:
    settings = ModelSettings(lora_model=str(place / adapter), use_cpu=True)
    return load_model(settings, resolve_models(settings))(IDS).logits


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "LORA"),
        ({"dora": True}, "DoRA"),
        ({"rslora": True, "lora_rank": 4}, "rsLoRA"),
        ({"lora_rank": 64}, "LORA"),
    ],
)
def test_the_merged_files_compute_what_base_and_adapter_do(place: Path, options: dict, kind: str) -> None:
    adapter_over(place / "base", place / "variant", **options)
    report = merged_into(place, "variant")
    assert report["adapter_kind"] == kind and report["dtype"] == "float32"
    assert report["in_memory"] == report["on_disk"] <= TOLERANCE and report["other_first_choice"] == 0
    merged = AutoModelForCausalLM.from_pretrained(place / "merged")
    assert merged.dtype == torch.float32
    assert (merged(IDS).logits - with_adapter(place, "variant")).abs().max() <= TOLERANCE
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    assert (merged(IDS).logits - base(IDS).logits).abs().max() > 0.01  # the adapter did something


def test_everything_that_belongs_to_the_model_comes_along(place: Path) -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template + "{# of the adapter #}"
    tokenizer.save_pretrained(place / "adapter")
    GenerationConfig(eos_token_id=[3, 4]).save_pretrained(place / "adapter")
    merged_into(place)
    assert AutoTokenizer.from_pretrained(place / "merged").chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(place / "merged").eos_token_id == [3, 4]
    for file in (place / "merged").iterdir():
        assert file.stat().st_mode & 0o044 == 0o044, file.name
    assert not [one for one in place.iterdir() if "tmp" in one.name]


def test_a_smaller_format_says_what_it_costs(place: Path) -> None:
    report = merged_into(place, dtype="bf16")
    assert report["dtype"] == "bfloat16" and report["in_memory"] <= TOLERANCE < report["on_disk"]
    assert AutoModelForCausalLM.from_pretrained(place / "merged").dtype == torch.bfloat16


def test_large_models_are_written_in_shards(place: Path) -> None:
    merged_into(place, shard_size="100KB")
    assert len(list((place / "merged").glob("*.safetensors"))) > 1
    assert json.loads((place / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    merged = AutoModelForCausalLM.from_pretrained(place / "merged")
    assert (merged(IDS).logits - with_adapter(place)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("size", ["many", "0GB", "4", "-1MB"])
def test_a_wrong_shard_size_is_refused_at_once(place: Path, size: str) -> None:
    with pytest.raises(UsageError, match="--shard-size"):
        merged_into(place, shard_size=size)


def test_an_adapter_that_is_not_finite_is_refused_and_leaves_nothing(place: Path) -> None:
    file = place / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    save_file({**weights, first: weights[first] * float("nan")}, file)
    with pytest.raises(UsageError, match="not finite"):
        merged_into(place)
    assert sorted(one.name for one in place.iterdir()) == ["adapter", "base"]


def test_noise_of_fp32_is_told_from_a_wrong_merge(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the tolerance float64 decides; a difference that stays is refused, and nothing is written."""
    noise = merged_into(place)["in_memory"]
    monkeypatch.setattr(merging, "TOLERANCE", noise * 0.9)
    report = merged_into(place, output_dir=place / "again")
    assert report["in_float64"] <= noise * 0.9 < report["in_memory"]
    monkeypatch.setattr(merging, "TOLERANCE", 1e-12)
    with pytest.raises(MedgptError, match="do not compute what base and adapter do"):
        merged_into(place, output_dir=place / "never")
    assert sorted(one.name for one in place.iterdir()) == ["adapter", "again", "base", "merged"]


@pytest.mark.parametrize("output", ["base", "adapter", "base/merged", "adapter/new", "taken"])
def test_nothing_is_overwritten(place: Path, output: str) -> None:
    (place / "taken").mkdir()
    before = sorted(place.rglob("*"))
    with pytest.raises(UsageError, match="--output-dir"):
        merged_into(place, output_dir=place / output)
    assert sorted(place.rglob("*")) == before


def test_what_cannot_be_merged_is_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="whole model"):
        merged_into(place, "base")
    quantised = tiny_model(place / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="quantised"):
        merged_into(place, base_model=str(quantised))
    reward = place / "adapter" / "adapter_config.json"
    reward.write_text(json.dumps({**json.loads(reward.read_text()), "task_type": "SEQ_CLS"}))
    with pytest.raises(UsageError, match="SEQ_CLS"):
        merged_into(place)


def test_another_vocabulary_is_refused(place: Path) -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_tokens(["发热"])
    tokenizer.save_pretrained(place / "adapter")
    with pytest.raises(UsageError, match="tokens"):
        merged_into(place)


def test_the_command_prints_the_check(place: Path) -> None:
    done = medgpt("merge-lora", "--lora-model", "adapter", "--output-dir", "merged", "--use-cpu", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "merged"
    assert "logits of the merged weights differ from base + adapter by at most" in done.stderr
    again = medgpt("merge-lora", "--lora-model", "adapter", "--output-dir", "merged", "--use-cpu", cwd=place)
    assert again.returncode == 2 and "exists already" in again.stderr
