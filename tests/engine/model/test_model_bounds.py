"""Configurations, adapters and tokenizers that would take any time or memory: refused with the bound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from medicalgpt_cli.engine.data.rendering import encode_prompt, encode_texts
from medicalgpt_cli.engine.model.loading import read_tokenizer
from medicalgpt_cli.engine.model.model_files import read_adapter_config, read_config
from medicalgpt_cli.engine.model.references import resolve
from medicalgpt_cli.engine.model.tokenizer_check import check_tokenizer
from medicalgpt_cli.errors import MedgptError, UnsafeRefused, UsageError
from tests.tiny import STYLES, tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("MEDGPT_HOME", str(tmp_path / "home"))


def config(folder: Path, name: str = "config.json", **content) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9), ("n_layer", 10**9), ("num_local_experts", 10**9), ("vocab_size", 10**12),
        ("hidden_size", 10**9), ("num_hidden_layers", -(10**9)), ("num_labels", 10**9), ("anything", 10**30),
        ("text_config", {"vision_config": {"num_hidden_layers": 10**9}}), ("layers", [{"num_heads": 10**9}]),
    ],
)  # fmt: skip
def test_sizes_that_no_model_has(key, value, tmp_path):
    path = config(tmp_path / "m", model_type="llama", **{key: value})
    with pytest.raises(UnsafeRefused, match="is beyond") as caught:
        resolve(str(path.parent))
    assert "config.json" in caught.value.message and caught.value.hint


def test_sizes_of_models_in_use_pass(tmp_path):
    sizes = {
        "num_hidden_layers": 126, "hidden_size": 18432, "intermediate_size": 73728, "vocab_size": 262208,
        "max_position_embeddings": 10485760, "num_experts": 2048, "rope_theta": 1e9, "eos_token_id": [1, 2],
        "rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 8192}, "attn_logit_softcapping": None,
        "layer_types": ["full_attention"] * 126, "time_step_limit": [0.0, float("inf")],
    }  # fmt: skip
    assert read_config(config(tmp_path / "m", **sizes))["hidden_size"] == 18432


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a":' * 60 + "1" + "}" * 60, "[]", "null", "", '{"a": ', "\xff"]
)
def test_what_is_no_object(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises((UsageError, UnsafeRefused)) as caught:
        read_config(path)
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"layer_replication": [[0, 10**8]]}, "layer_replication"),
        ({"layer_replication": [[0, 30]] * 1000}, "layer_replication"),
        ({"target_modules": r"(.*a*)*(.*a*)*b"}, "1 s"),
        ({"target_modules": r"((a+)+)+\$"}, "1 s"),
        ({"target_modules": ["q_proj"], "rank_pattern": {r"((\w+)+)+\$": 4}}, "1 s"),
        ({"target_modules": "a" * 20_000 + "*"}, "10,000 characters"),
        ({"r": 10**7}, "weights cannot have"),
        ({"megatron_config": {}, "megatron_core": "antigravity"}, "megatron"),
    ],
)
def test_adapters_that_take_any_time(content, word, tmp_path):
    config(tmp_path / "a", "adapter_config.json", **content)
    with pytest.raises(UnsafeRefused) as caught:
        read_adapter_config(tmp_path / "a")
    assert word in caught.value.message and caught.value.hint


def test_patterns_in_use_pass(tmp_path):
    for pattern in (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.q_proj)",
        r".*\.(q|v)_proj", "all-linear", r"model\.layers\.(1[0-9]|2[0-7])\.mlp\..*",
    ):  # fmt: skip
        config(
            tmp_path / "a", "adapter_config.json", target_modules=pattern, layer_replication=[[0, 4], [2, 6]]
        )
        read_adapter_config(tmp_path / "a")
    config(tmp_path / "a", "adapter_config.json", target_modules="(")
    with pytest.raises(UsageError, match="no regular expression"):
        read_adapter_config(tmp_path / "a")


# -- tokenizers ---------------------------------------------------------------------------------------------


def changed(normalizer=None, split: str | None = None):
    tokenizer = tiny_tokenizer()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if split is not None:
        cut = pre_tokenizers.Split(Regex(split), "isolated")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(False)]
        )
    return tokenizer


def doubling(times: int):
    return normalizers.Sequence([normalizers.Replace("e", "ee") for _ in range(times)])


@pytest.mark.parametrize(
    ("tokenizer", "word"),
    [
        (lambda: changed(doubling(40)), "times as long"),
        (lambda: changed(normalizers.Replace("q", "q" * 10**6)), "times as long"),
        (lambda: changed(normalizers.Replace(Regex("[qQ]"), "zz" * 500)), "times as long"),
        (lambda: changed(split=r"(x+x+)+y"), "too many steps"),
        (lambda: changed(split=r"(a+)+\$"), "too many steps"),
    ],
)
def test_tokenizers_that_take_any_time(tokenizer, word, tmp_path):
    tokenizer().save_pretrained(tmp_path / "t")
    with pytest.raises(UnsafeRefused) as caught:
        read_tokenizer(str(tmp_path / "t"))
    assert word in caught.value.message and caught.value.hint and "\n" not in caught.value.message


def test_tokenizers_in_use_pass(tmp_path):
    for style in STYLES:
        check_tokenizer(tiny_tokenizer(style), "x")
    check_tokenizer(
        changed(normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])), "x"
    )
    assert list((tmp_path / "home" / "checked").iterdir())


def test_a_panic_in_the_middle_of_the_data_is_one_line():
    tokenizer = changed(split=r"(k+k+)+y")
    with pytest.raises(UnsafeRefused, match="gives up on a text"):
        encode_texts(tokenizer, ["a", "k" * 60])
    with pytest.raises(UnsafeRefused, match="gives up on a text"):
        encode_prompt(tokenizer, [{"role": "user", "content": "k" * 60}])


def test_a_damaged_tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "t")
    path = tmp_path / "t" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": [1]}))
    with pytest.raises(MedgptError, match="model_max_length"):
        read_tokenizer(str(tmp_path / "t"))
    shutil.rmtree(tmp_path / "t")
