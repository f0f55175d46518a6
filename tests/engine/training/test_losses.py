"""The loss in pieces against the plain one over all logits: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.training import attention, losses
from medicalgpt_cli.engine.training.batches import IGNORED, end_to_end, padded
from medicalgpt_cli.engine.training.losses import target_loss
from tests.tiny import tiny_model


def batch_of(vocabulary: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(0, vocabulary, (3, 11))
    labels = torch.where(torch.rand(3, 11) < 0.5, torch.randint(0, vocabulary, (3, 11)), IGNORED)
    return {"input_ids": ids, "labels": labels, "shift_labels": labels}


def plain_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(
        logits.flatten(0, 1), batch["shift_labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (loss * 0.37).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def llama(folder, kind: str):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(folder), dtype=torch.float32)
    if kind == "full":
        return model.requires_grad_(True)
    more = {
        "frozen head": {},
        "new rows": {"trainable_token_indices": {"embed_tokens": [3, 4, 5]}},
        "all rows": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    }[kind]
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **more))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("kind", ["frozen head", "full", "new rows", "all rows"])
def test_equals_the_plain_loss(tmp_path, monkeypatch, kind: str, rows: int) -> None:
    model = llama(tmp_path, kind)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    monkeypatch.setattr(losses, "_LOGITS", rows * vocabulary)
    batch = batch_of(vocabulary)
    expected = gradients(model, one := plain_loss(model, batch))
    found = gradients(model, other := target_loss(model, batch))
    assert losses._head_comes_last(model)  # it is the loss in pieces that is looked at
    assert float(other.detach()) == pytest.approx(float(one.detach()), rel=1e-6)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5), name
    with torch.no_grad():
        assert float(target_loss(model, batch)) == pytest.approx(float(one.detach()), rel=1e-6)


@pytest.mark.parametrize("rows", [4, 1000])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kind", ["frozen head", "full"])
def test_log_probabilities_and_entropy_equal_those_of_all_logits(
    tmp_path, monkeypatch, kind: str, entropy: bool, rows: int
) -> None:
    model = llama(tmp_path, kind)
    inner = model.get_base_model() if kind == "frozen head" else model
    vocabulary = model.get_input_embeddings().weight.shape[0]
    monkeypatch.setattr(losses, "_LOGITS", rows * vocabulary)
    torch.manual_seed(5)
    ids, tokens = torch.randint(0, vocabulary, (3, 11)), torch.randint(0, vocabulary, (9,))
    positions, weights = torch.randperm(33)[:9], torch.randn(2, 9)

    def weighed(logp: torch.Tensor, uncertain: torch.Tensor | None) -> torch.Tensor:
        loss = (weights[0] * logp).sum()
        return loss if uncertain is None else loss + (weights[1] * uncertain).sum()

    spread = torch.log_softmax(model(input_ids=ids).logits.flatten(0, 1)[positions] / 0.7, -1)
    plain = spread.gather(1, tokens[:, None])[:, 0], -(spread.exp() * spread).sum(-1) if entropy else None
    expected = gradients(model, weighed(*plain))
    asked = inner, {"input_ids": ids}, positions, tokens, 0.7
    found = losses.log_probabilities(*asked, entropy=entropy)
    assert losses._head_comes_last(inner)
    with torch.no_grad():
        unlearnt = losses.log_probabilities(*asked, entropy=entropy)
    for ours in (found, unlearnt):
        for one, other in zip(ours, plain, strict=True):
            assert one is other is None or torch.allclose(one, other, atol=1e-5)
    ours = gradients(model, weighed(*found))
    assert ours.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(ours[name], expected[name], rtol=1e-4, atol=1e-5), name


def test_the_loss_comes_in_pieces_where_examples_lie_end_to_end(tmp_path, monkeypatch) -> None:
    model = llama(tmp_path, "frozen head")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    monkeypatch.setattr(losses, "_LOGITS", 4 * vocabulary)
    torch.manual_seed(3)
    examples = [
        Example(ids, [IGNORED, *ids[1:]], "") for ids in torch.randint(0, vocabulary, (2, 7)).tolist()
    ]
    expected = float(target_loss(model, padded(examples, 0)).detach())
    del model.get_base_model()._medgpt_head_comes_last
    with attention.for_batches(model, True):
        found = target_loss(model, end_to_end(examples))
    assert losses._head_comes_last(model)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_caps_its_logits_takes_the_plain_way() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=1.0,
        )
    )  # fmt: skip
    batch = batch_of(99)
    assert not losses._head_comes_last(model)
    assert float(target_loss(model, batch).detach()) == pytest.approx(
        float(plain_loss(model, batch).detach())
    )
    ids = batch["input_ids"]
    logits = torch.log_softmax(model(input_ids=ids).logits.flatten(0, 1), -1)
    found, _ = losses.log_probabilities(model, {"input_ids": ids}, torch.arange(33), ids.flatten())
    assert torch.allclose(found, logits.gather(1, ids.flatten()[:, None])[:, 0], atol=1e-5)


def test_the_head_is_itself_again_also_after_an_error(tmp_path) -> None:
    model = llama(tmp_path, "frozen head")
    batch = batch_of(100)
    target_loss(model, batch)
    with pytest.raises(ValueError, match="inputs_embeds"):
        target_loss(model, {**batch, "inputs_embeds": 7})
    logits = model(input_ids=batch["input_ids"]).logits
    assert logits.shape[-1] == model.get_input_embeddings().weight.shape[0]
