"""Texts that are longer than a model's positions: refused where the model fails, said where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from medicalgpt_cli.engine.model.positions import must_reach, positions
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UsageError
from tests.cli import medgpt
from tests.engine.model.tiny_architectures import tiny_config
from tests.tiny import tiny_tokenizer, write_jsonl

# How many tokens each takes, found by reading one more.
LONGEST = {"gpt2": 512, "bart": 512, "roberta": 510, "mpt": 512, "ctrl": 256, "gptj": 512, "whisper": 448}


class Heard(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_warning(self, text: str) -> None:
        self.said.append(text)


def language_model(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(name, 1280, 2), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", LONGEST)
def test_the_last_position_is_where_the_model_fails(name: str) -> None:
    model, longest, heard = language_model(name), LONGEST[name], Heard()
    assert positions(model) == longest
    model(input_ids=torch.full((1, longest), 5), use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5), use_cache=False)
    must_reach(model, longest, heard, "--max-length")
    with pytest.raises(UsageError, match=f"its positions end at {longest}") as caught:
        must_reach(model, longest + 1, heard, "--max-length")
    assert caught.value.hint == f"--max-length {longest}" and heard.said == []


def test_positions_that_are_computed_have_no_end_but_a_word() -> None:
    heard = Heard()
    must_reach(language_model("llama"), 600, heard, "--max-length")
    assert heard.said == ["texts of up to 600 tokens: the model was made for 512 (--max-length bounds them)"]


def test_a_model_of_axial_positions_is_refused_before_it_learns() -> None:
    with pytest.raises(UsageError, match="reformer learns from texts of one length only"):
        must_reach(language_model("reformer"), 16, Heard(), "--max-length")


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 with 128 positions, and data beyond them."""
    place = tmp_path_factory.mktemp("short")
    tokenizer = tiny_tokenizer("chatml")
    config = tiny_config("gpt2", len(tokenizer), tokenizer.eos_token_id)
    config.n_positions = 128
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    turns = [("user", "Does tea help?"), ("assistant", "It does.")] * 12
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    write_jsonl(place / "talk.jsonl", [record] * 4)
    (place / "text.txt").write_text("\n\n".join(["Tea and water help against thirst. " * 20] * 8))
    return place


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("sft", "--train-data", "talk.jsonl"), "--max-length"),
        (("pretrain", "--train-data", "text.txt", "--block-size", "256"), "--block-size"),
    ],
)
def test_training_beyond_the_positions_is_one_line(short_model: Path, arguments, option: str) -> None:
    given = (*arguments, "--base-model", "model", "--eval-fraction", "0", "--max-steps", "1", "--use-cpu")
    done = medgpt(*given, "--output-dir", arguments[0], cwd=short_model)
    assert done.returncode == 2
    assert "longer than this model can read: its positions end at 128" in done.stderr
    assert f"hint: {option} 128" in done.stderr
    again = medgpt(*given, option, "128", "--output-dir", f"{arguments[0]}-128", "--json", cwd=short_model)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["steps"] == 1
