"""merge-lora: the merged model is base + adapter, on disk, and never in place of something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config

from medicalgpt_cli.engine.model import merging
from medicalgpt_cli.engine.model.loading import load_model
from medicalgpt_cli.engine.model.merging import TOLERANCE, merge
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.tuning import load_trainable
from medicalgpt_cli.errors import MedgptError, UsageError
from medicalgpt_cli.settings.groups import ModelSettings
from medicalgpt_cli.settings.stages import MergeLoraSettings, SftSettings
from tests.cli import medgpt
from tests.engine.model.test_loading import adapter_over
from tests.families import family
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
    """Beyond the tolerance the model's own noise decides; what that does not explain is refused."""
    report = merged_into(place)
    assert 0 < report["in_memory"] < 10 * report["noise"] < 1e-3
    assert report["tolerance"] == max(TOLERANCE, 10 * report["noise"])
    monkeypatch.setattr(merging, "TOLERANCE", 0.0)
    assert merged_into(place, output_dir=place / "again")["tolerance"] == 10 * report["noise"]
    monkeypatch.setattr(merging, "_TIMES_NOISE", 0)
    with pytest.raises(MedgptError, match="do not compute what base and adapter do"):
        merged_into(place, output_dir=place / "never")
    assert sorted(one.name for one in place.iterdir()) == ["adapter", "again", "base", "merged"]


def test_a_weight_that_is_not_the_sum_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that merges a change a thousandth too large: logits would hardly tell."""
    from peft.tuners.lora.layer import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) * 1.001)
    with pytest.raises(MedgptError, match="q_proj is not the sum of base and adapter"):
        merged_into(place)
    assert sorted(one.name for one in place.iterdir()) == ["adapter", "base"]


def adapted(folder: Path, config, **options) -> Path:
    """A tiny model of a family, and an adapter over it that changes something."""
    tokenizer, base, adapter = tiny_tokenizer(), folder / "family", folder / "its-adapter"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    options = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False, **options}
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(
        adapter, save_embedding_layers=False
    )
    tokenizer.save_pretrained(base)
    return folder


GPT2 = GPT2Config(vocab_size=1280, n_embd=32, n_layer=2, n_head=2, n_positions=512)
TABLE = {"target_modules": ["embed_tokens", "q_proj"]}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (family("qwen3_5_text"), {}),
        (family("gemma3_text", initializer_range=0.4), {}),  # logits in the hundreds
        (family("gemma3"), {"target_modules": "all-linear", "exclude_modules": ".*vision.*|.*projector.*"}),
        (GPT2, {"target_modules": ["c_attn", "c_fc"]}),  # weights that lie the other way
        (GPT2, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
        (family("llama", tie_word_embeddings=False), TABLE),
    ],
    ids=["qwen3_5", "gemma3_text", "gemma3", "gpt2", "gpt2 dora", "table"],
)
def test_right_merges_of_other_families_go_through(config, options: dict, tmp_path: Path) -> None:
    report = merged_into(
        adapted(tmp_path, config, **options), "its-adapter", base_model=str(tmp_path / "family")
    )
    assert report["layers_compared"] > 0 and report["in_memory"] == report["on_disk"] <= report["tolerance"]
    ids = IDS.clamp(max=1000)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "family")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged(ids).logits - base(ids).logits).abs().max() > 100 * report["in_memory"]


@pytest.mark.parametrize(
    ("config", "options", "shared"),
    [
        (family("zamba2"), {"target_modules": ["q_proj", "gate_up_proj"]}, "shared_transformer"),
        (family("llama", tie_word_embeddings=True), TABLE, "embed_tokens"),
    ],
    ids=["blocks", "table"],
)
def test_changes_of_a_weight_that_stands_in_two_places_are_refused(
    config, options: dict, shared: str, tmp_path: Path
) -> None:
    place = adapted(tmp_path, config, **options)
    with pytest.raises(UsageError, match=f"{shared}.* share one weight") as caught:
        merged_into(place, "its-adapter", base_model=str(tmp_path / "family"))
    assert "--lora-model" in caught.value.hint and not (place / "merged").exists()
    settings = SftSettings(
        lora_model=str(place / "its-adapter"), base_model=str(place / "family"), tuning="full", use_cpu=True,
        train_data=("-",),
    )  # fmt: skip
    with pytest.raises(UsageError, match="share one weight"):
        load_trainable(settings, resolve_models(settings), Observer())


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
