"""A pair's prompt computed once: the same scores, losses and gradients as of both answers by themselves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.evaluation.preferences import score_pairs, score_rows
from medicalgpt_cli.engine.model.reward_model import score_at_ends
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.preference_loss import bradley_terry_loss
from medicalgpt_cli.engine.training.reward_data import (
    RenderedPair,
    behind_their_prompts,
    each_by_itself,
    laid_end_to_end,
    padded_right,
    pair_layout,
)

ROWS = st.lists(st.integers(3, 8), min_size=1, max_size=12)
PAD = 2  # also the end of every answer: what is padding is known by its place


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> RenderedPair:
    return RenderedPair([*prompt, *chosen, PAD], [*prompt, *rejected, PAD], 0.0, None, "x", "p")


PAIRS = [
    pair([5, 6, 7, 8, 9, 10, 11], [12, 13], [14]),
    pair([3], [4, 5, 6, 7, 8], [9, 9]),
    pair([3, 4, 5], [6, 7, 8, 9], [6, 7, 10]),  # the answers begin alike
    RenderedPair([20, 21, PAD], [30, 31, 32, PAD], 0.0, None, "x", "p"),  # nothing in common
]


def reward_model(kind: str):
    """A tiny model with a head, as `medgpt reward` makes it, and with LoRA that is not the identity."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "num_labels": 1,
        "pad_token_id": PAD,
    }
    more = {
        "llama": {"num_key_value_heads": 4},
        "llama, grouped": {"model_type": "llama", "num_key_value_heads": 2},
        "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
        "mistral": {"num_key_value_heads": 2, "sliding_window": None},
        "mistral, window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 4},
    }[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"model_type": kind, **sizes, **more})
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.forward = score_at_ends.__get__(model)
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    wrapped = get_peft_model(model, lora)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return wrapped.train()


MODELS = ("llama", "llama, grouped", "qwen3", "mistral")


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_the_same(kind: str) -> None:
    model = reward_model(kind)
    assert attention.is_exact(model) and attention.borrows_prefixes(model)
    found = []
    for lay, free in (
        (behind_their_prompts, True),
        (partial(each_by_itself, lay=laid_end_to_end), True),
        (partial(each_by_itself, lay=partial(padded_right, pad_id=PAD)), False),
    ):
        model.zero_grad()
        with attention.for_batches(model, free):
            scores = model(**lay(PAIRS)).logits
        loss = bradley_terry_loss(*scores.chunk(2), centring=0.1)
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        found.append((scores.detach(), loss.detach(), gradients))
    alone = torch.cat(
        [
            score_alone(model, row)
            for row in [*(one.chosen for one in PAIRS), *(one.rejected for one in PAIRS)]
        ]
    )
    for scores, loss, gradients in found:
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(loss, found[1][1], atol=1e-5, rtol=0)
        assert gradients.keys() == found[1][2].keys() and len(gradients) == 13
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradient, found[1][2][name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def score_alone(model, row: list[int]) -> torch.Tensor:
    """The score by hand: one row through the library's own attention, the head on its last hidden state."""
    body = model.get_base_model()
    hidden = body.model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state
    return hidden[0, -1] @ body.score.weight[0][:, None]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ROWS, ROWS, ROWS), min_size=1, max_size=4))
def test_any_pairs(model, texts) -> None:
    """Prompts of any length, answers that begin alike, one the beginning of the other, or wholly the same."""
    pairs = [pair(*text) for text in texts]
    batch = behind_their_prompts(pairs)
    tokens = sum(len(one.chosen) + len(one.rejected) - one.shared for one in pairs)
    assert batch["input_ids"].shape == (1, tokens)
    for one, text in zip(pairs, texts, strict=True):
        assert one.shared >= len(text[0])
        assert one.chosen[: one.shared] == one.rejected[: one.shared]
    with torch.no_grad(), attention.for_batches(model, True):
        scores = model(**batch).logits.tolist()
    expected = [float(score_alone(model, one.chosen)) for one in pairs]
    expected += [float(score_alone(model, one.rejected)) for one in pairs]
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def model():
    return reward_model("llama, grouped").eval()


def test_the_answers_do_not_see_each_other(model) -> None:
    with torch.no_grad(), attention.for_batches(model, True):
        one = model(**behind_their_prompts(PAIRS)).logits
        other = [pair([5, 6, 7, 8, 9, 10, 11], [40, 41, 42], [14]), *PAIRS[1:]]
        two = model(**behind_their_prompts(other)).logits
    changed = (one - two).abs() > 1e-6
    assert changed.nonzero().flatten().tolist() == [0]


def test_a_model_with_a_window_repeats_the_prompts() -> None:
    model = reward_model("mistral, window").eval()
    assert attention.is_exact(model) and not attention.borrows_prefixes(model)
    lay = pair_layout(model, True, PAD)
    assert "prefixes" not in lay(PAIRS)
    with attention.for_batches(model, True):
        scores = score_pairs(model, PAIRS, lay, batch_size=2)
    expected = [[float(score_alone(model, row)) for row in (one.chosen, one.rejected)] for one in PAIRS]
    for found, wanted in zip(scores, zip(*expected, strict=True), strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match="sliding window"), attention.for_batches(model, True):
        model(**behind_their_prompts(PAIRS))


def test_a_model_with_a_state_along_the_row_repeats_the_prompts() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    ).eval()
    assert not attention.borrows_prefixes(mamba)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_scores_do_not_depend_on_batch_or_layout(model, batch_size: int) -> None:
    rows = [one.chosen for one in PAIRS] + [one.rejected for one in PAIRS]
    expected = [float(score_alone(model, row)) for row in rows]
    padded = partial(padded_right, pad_id=PAD)
    with attention.for_batches(model, True):
        assert score_rows(model, rows, laid_end_to_end, batch_size=batch_size) == pytest.approx(
            expected, abs=1e-5
        )
        chosen, rejected = score_pairs(model, PAIRS, behind_their_prompts, batch_size=batch_size)
    assert chosen + rejected == pytest.approx(expected, abs=1e-5)
    assert score_rows(model, rows, padded, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)
    other = partial(padded_right, pad_id=33)  # what padding holds does not matter
    assert score_rows(model, rows, other, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)
    assert not model.training


def test_scoring_stops_where_it_is_told_to_and_keeps_the_mode(model) -> None:
    model.train()
    asked = iter([False, True])
    try:
        found = score_pairs(
            model, PAIRS, pair_layout(model, False, PAD), batch_size=1, should_stop=lambda: next(asked)
        )
        assert found is None and model.training
    finally:
        model.eval()
