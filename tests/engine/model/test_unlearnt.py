"""A template's end token that the base never learnt is named; one that it learnt is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medicalgpt_cli.engine.model.unlearnt import unlearnt_end
from tests.cli import medgpt
from tests.tiny import tiny_model, tiny_tokenizer, write_jsonl


def made(spare: int = 0):
    """A model whose head has rows of many lengths, with `spare` rows more than there are tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer("chatml")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + spare, hidden_size=64, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[: len(tokenizer)] *= torch.rand(len(tokenizer), 1) + 0.5
        rows[len(tokenizer) :] *= 0.9 / rows[len(tokenizer) :].norm(dim=1, keepdim=True)
    return model, tokenizer


def test_a_learnt_token_is_not_named() -> None:
    assert unlearnt_end(*made()) is None
    assert unlearnt_end(*made(spare=64)) is None


def test_a_row_next_to_zero() -> None:
    model, tokenizer = made()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 0.01
    assert "next to zero" in unlearnt_end(model, tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_another_token_has_too(dtype) -> None:
    model, tokenizer = made()
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = model.lm_head.weight[other]
    assert "another token" in unlearnt_end(model.to(dtype), tokenizer)


def test_a_row_as_long_as_those_of_no_token() -> None:
    model, tokenizer = made(spare=64)
    with torch.no_grad():
        row = model.lm_head.weight[tokenizer.eos_token_id]
        row *= 0.9 / row.norm()
    assert "unused tokens" in unlearnt_end(model, tokenizer)


def test_sft_says_so_where_the_row_does_not_learn(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 0.01
    model.save_pretrained(folder)
    write_jsonl(tmp_path / "a.jsonl", [{"question": f"What {n}?", "answer": "Rest."} for n in range(4)])
    command = ("sft", "--base-model", "model", "--train-data", "a.jsonl", "--max-steps", "1", "--use-cpu")
    done = medgpt(*command, "--output-dir", "one", cwd=tmp_path)
    said = " ".join(done.stderr.split())
    assert done.returncode == 0 and "<|im_end|>, with which the chat template ends an answer" in said
    assert "--embeddings all" in said
    done = medgpt(*command, "--output-dir", "two", "--embeddings", "all", cwd=tmp_path)
    assert done.returncode == 0 and "with which the chat template" not in " ".join(done.stderr.split())
