"""A model that sees what it is to predict is refused, whatever the library calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medicalgpt_cli.engine.model.loading import load_model
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.groups import ModelSettings
from tests.cli import medgpt
from tests.tiny import tiny_tokenizer, write_jsonl


def made(kind: str, folder: Path, **settings: object) -> ModelSettings:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer("chatml")
    end = tokenizer.eos_token_id
    shape = {
        "bert": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    }
    shape["xlnet"] = {"d_model": 64, "d_inner": 96, "n_layer": 2, "n_head": 4}
    config = AutoConfig.for_model(
        kind, **shape[kind], vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end,
        initializer_range=0.2, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSettings(base_model=str(folder), use_cpu=True)


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_a_model_that_sees_what_follows_is_refused(kind: str, tmp_path: Path) -> None:
    settings = made(kind, tmp_path / kind)
    with pytest.raises(UsageError, match="no causal language model"):
        load_model(settings, resolve_models(settings))


def test_the_same_encoder_as_a_decoder_is_taken(tmp_path: Path) -> None:
    settings = made("bert", tmp_path / "bert", is_decoder=True)
    assert load_model(settings, resolve_models(settings))


def test_training_on_an_encoder_ends_with_one_line(tmp_path: Path) -> None:
    made("bert", tmp_path / "bert")
    write_jsonl(tmp_path / "a.jsonl", [{"question": f"What {n}?", "answer": "Rest."} for n in range(4)])
    done = medgpt(
        *("sft", "--base-model", "bert", "--train-data", "a.jsonl", "--max-steps", "1", "--use-cpu"),
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "no causal language model" in done.stderr
