"""Reward models of families for which the library has no class with a scalar head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

from medicalgpt_cli.engine.model.adapters import save_adapter
from medicalgpt_cli.engine.model.parts import body_of
from medicalgpt_cli.engine.model.references import ModelReference, ResolvedModel
from medicalgpt_cli.engine.model.reward_model import load_reward_model, new_reward_model
from medicalgpt_cli.engine.model.score_head import class_with_head
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.preference_loss import bradley_terry_loss
from medicalgpt_cli.engine.training.reward_data import padded_right
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.stages import RewardSettings
from tests.cli import medgpt
from tests.families import family
from tests.tiny import tiny_tokenizer, write_jsonl

NONE_IN_THE_LIBRARY = [
    "granite", "cohere2", "ernie4_5", "lfm2", "olmoe", "internlm3", "glm4_moe", "bamba", "llama4", "gemma4",
    "falcon_h1", "gemma3n_text", "mamba", "nemotron_h",
]  # fmt: skip
CPU = torch.device("cpu")
PAD = 7  # a token that answers have, too
ROWS = [[5, 6, PAD, 8, 9, 10, 11, PAD], [12, 13, PAD]]


def saved(name: str, folder: Path) -> ResolvedModel:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(family(name), dtype=torch.float32).save_pretrained(folder)
    return ResolvedModel(ModelReference(folder.name, "folder", str(folder)), None, str(folder))


def trained(model) -> None:
    """Two steps on one pair, the way `medgpt reward` takes them."""
    learns = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=0.01)
    for _ in range(2):
        chosen, rejected = model.train()(**padded_right(ROWS, PAD)).logits.chunk(2)
        bradley_terry_loss(chosen, rejected, torch.zeros(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def by_hand(model) -> torch.Tensor:
    """Each row alone, its last hidden state times the head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.score.modules_to_save["default"] if hasattr(inner.score, "modules_to_save") else inner.score
    states = [
        body_of(inner)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state for row in ROWS
    ]
    return torch.stack([head.weight[0] @ one[0, -1] for one in states])


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", NONE_IN_THE_LIBRARY)
def test_what_is_trained_and_saved_scores_the_same_again(name: str, tuning: str, tmp_path: Path) -> None:
    assert family(name).model_type not in KNOWN
    base = saved(name, tmp_path / "base")
    model = new_reward_model(RewardSettings(use_cpu=True, tuning=tuning, train_data=("-",)), base, Observer())
    before = by_hand(model.eval())
    trained(model)
    with torch.no_grad():
        scores = model(**padded_right(ROWS, PAD)).logits
    assert (scores - before).abs().max() > 1e-4
    torch.testing.assert_close(
        scores, by_hand(model), rtol=0, atol=1e-5
    )  # the last real token, whatever pad is
    if tuning == "lora":
        save_adapter(model, tmp_path / "reward", base.base.path)
        adapter = ModelReference("reward", "adapter", str(tmp_path / "reward"), base.base)
        found = ResolvedModel(base.base, adapter, base.tokenizer)
    else:
        model.save_pretrained(tmp_path / "reward")
        assert not list((tmp_path / "reward").glob("generation_config.json"))
        place = ModelReference("reward", "folder", str(tmp_path / "reward"))
        found = ResolvedModel(place, None, base.tokenizer)
    again = load_reward_model(found, torch.float32, CPU)
    with torch.no_grad():
        torch.testing.assert_close(again(**padded_right(ROWS, PAD)).logits, scores, rtol=0, atol=1e-5)


def test_the_librarys_own_class_is_taken_where_there_is_one() -> None:
    for name in ("llama", "jamba", "gemma3"):
        kind, config = class_with_head(family(name))
        assert kind.__name__ == KNOWN[config.model_type] and config.num_labels == 1
    assert class_with_head(GPT2Config(n_layer=2, n_embd=32, n_head=2))[0].__name__ == KNOWN["gpt2"]


def test_classifiers_with_another_head_and_other_models_are_refused() -> None:
    from transformers import BertConfig, SiglipConfig

    with pytest.raises(UsageError, match="has no scalar head named score"):
        class_with_head(BertConfig(architectures=["BertForSequenceClassification"]))
    with pytest.raises(UsageError, match="no causal language model"):
        class_with_head(SiglipConfig())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    rows = [{"prompt": f"What about fever {n}?"} for n in range(12)]
    write_jsonl(folder / "prompts.jsonl", rows)
    pairs = [{**row, "chosen": "Please rest.", "rejected": f"no {n}"} for n, row in enumerate(rows)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


@pytest.mark.parametrize("name", ["llama4", "gemma4"])
def test_reward_score_and_rl_over_one_base(name: str, place: Path) -> None:
    saved(name, place / name)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(place / name)

    def run(*arguments: object) -> str:
        done = medgpt(*arguments, "--use-cpu", cwd=place)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    quick = ("--max-steps", 2, "--batch-size", 4, "--base-model", name)
    said = run("reward", *quick, "--train-data", "pairs.jsonl", "--output-dir", f"{name}-reward")
    assert "plan: " in said
    for size in (1, 5):
        flags = ("--reward-model", f"{name}-reward", "--data-file", "pairs.jsonl", "--batch-size", size)
        run("score", *flags, "--predictions-file", f"{name}-{size}.jsonl")
    one, other = (
        [
            json.loads(line)["score_chosen"]
            for line in (place / f"{name}-{size}.jsonl").read_text().splitlines()
        ]
        for size in (1, 5)
    )
    assert one == pytest.approx(other, abs=1e-5) and len(set(one)) > 1
    rl = ("--train-data", "prompts.jsonl", "--reward-model", f"{name}-reward", "--max-new-tokens", 6)
    rl = (*rl, "--minibatch-size", 4)
    said = run("rl", *quick, *rl, "--output-dir", f"{name}-rl")
    assert "share one copy of the base weights" in said and "plan: " in said
