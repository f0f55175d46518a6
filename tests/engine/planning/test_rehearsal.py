"""What a rehearsal counts against what real tensors of the same model keep."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.model.adapters import add_adapter
from medicalgpt_cli.engine.model.dropout import use_fast_dropout
from medicalgpt_cli.engine.planning import rehearsal
from medicalgpt_cli.engine.planning.rehearsal import Manner, Rows, rehearse
from medicalgpt_cli.engine.planning.skeleton import Outline
from medicalgpt_cli.engine.training import attention, losses
from medicalgpt_cli.engine.training.batches import IGNORED, end_to_end
from medicalgpt_cli.engine.training.losses import target_loss
from medicalgpt_cli.settings.groups import AdapterSettings

SMALL = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16}
LENGTHS = (40, 33, 21)
KINDS = {
    "lora": (LlamaConfig(**SMALL, tie_word_embeddings=True), AdapterSettings(), False),
    "lora without dropout": (Qwen2Config(**SMALL), AdapterSettings(lora_dropout=0.0), False),
    "full": (LlamaConfig(**SMALL, tie_word_embeddings=True), AdapterSettings(tuning="full"), False),
    "recomputed": (LlamaConfig(**SMALL), AdapterSettings(), True),
    "experts": (Qwen3MoeConfig(**SMALL, **EXPERTS), AdapterSettings(), False),
    "experts that learn": (Qwen3MoeConfig(**SMALL, **EXPERTS), AdapterSettings(tuning="full"), False),
}


def saved_bytes(config, settings: AdapterSettings, recompute: bool, at_once: bool) -> int:
    """What autograd of a real model holds when the backward pass begins, its weights aside."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if settings.tuning == "lora":
        model = add_adapter(model, settings, seed=0)
        use_fast_dropout(model)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}  # held here, so that no other tensor gets the same place

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype != torch.int64:
            found[storage.data_ptr()] = storage
        return tensor

    examples = [Example(list(range(n)), [IGNORED, *range(1, n)], "") for n in LENGTHS]
    with attention.for_batches(model, True):
        target_loss(model, end_to_end(examples))  # asks the model about its head
        if at_once:  # what is answered where processes share the weights
            losses._inner(model)._medgpt_head_comes_last = False
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            target_loss(model, end_to_end(examples))
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_keeps_what_a_real_step_keeps(kind: str, at_once: bool) -> None:
    config, settings, recompute = KINDS[kind]
    rows = Rows(LENGTHS, sum(LENGTHS) - len(LENGTHS))
    outline = Outline(config, torch.float32, tuning=settings)
    act = "next token at once" if at_once else "next token"
    found = rehearse(outline, rows, Manner(act, checkpointing=recompute))
    expected = saved_bytes(config, settings, recompute, at_once)
    # Beside what autograd was given to save, a step holds its inputs, positions and a few scalars.
    assert found.kept == pytest.approx(expected, rel=0.03, abs=24_000)
    assert found.peak > found.kept


def test_a_deep_model_is_told_from_two_short_ones(monkeypatch) -> None:
    outline = Outline(
        LlamaConfig(**{**SMALL, "num_hidden_layers": 9}), torch.float32, tuning=AdapterSettings()
    )
    short = rehearse(outline, Rows(LENGTHS, 60), Manner("next token"))
    monkeypatch.setattr(rehearsal, "_LONG", 100)
    assert rehearse(outline, Rows(LENGTHS, 60), Manner("next token")) == short


def test_recomputation_keeps_little_and_padding_costs() -> None:
    outline = Outline(LlamaConfig(**SMALL), torch.float32, tuning=AdapterSettings())
    rows = Rows((40, 10), 40)
    plain = rehearse(outline, rows, Manner("next token"))
    assert rehearse(outline, rows, Manner("next token", checkpointing=True)).kept < plain.kept / 5
    assert rehearse(outline, Rows((40, 10), 40, padded=True), Manner("next token")).kept > 1.5 * plain.kept


def test_eight_bits_keep_more_than_four() -> None:
    kept = {}
    for bits in (None, "4bit", "8bit"):
        outline = Outline(LlamaConfig(**SMALL), torch.float32, tuning=AdapterSettings(), quantization=bits)
        kept[bits] = rehearse(outline, Rows(LENGTHS, 60), Manner("next token")).kept
    assert kept["4bit"] == kept[None] < kept["8bit"]


@pytest.mark.parametrize("act", ["score", "policy", "value", "look back", "answer"])
def test_every_act_is_rehearsed(act) -> None:
    kind = "reward" if act == "score" else "language"
    outline = Outline(LlamaConfig(**SMALL), torch.float32, kind=kind, tuning=AdapterSettings())
    prefixes = ((0, 0), (0, 10)) if act == "score" else ()
    found = rehearse(outline, Rows((30, 12), 20, prefixes=prefixes), Manner(act))
    assert found.peak > 0 and (found.kept > 0) == (act in ("score", "policy", "value"))


def test_gradients_that_are_given_away_are_not_counted() -> None:
    config = LlamaConfig(**SMALL)
    outline = Outline(config, torch.float32, tuning=AdapterSettings(tuning="full"))
    short = Rows((3,), 2)  # so that gradients are most of it
    kept = rehearse(outline, short, Manner("next token")).peak
    given = rehearse(outline, short, Manner("next token", spread=True)).peak
    weights = 4 * sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    assert kept > weights > 2 * given


@pytest.mark.parametrize("kind", ["language", "reward"])
def test_batches_are_planned_padded_where_they_will_be(kind: str) -> None:
    """Gemma 2's attention takes a cap on its scores, which ours does not compute."""
    assert rehearsal.lies_end_to_end(Outline(LlamaConfig(**SMALL), torch.float32, kind=kind))
    assert not rehearsal.lies_end_to_end(
        Outline(Gemma2Config(**SMALL, head_dim=16), torch.float32, kind=kind)
    )
