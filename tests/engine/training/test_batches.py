"""Batches: every token once, in an order that a resumed run repeats, and attention that stays inside an example."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTJConfig, GPTJForCausalLM

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.batches import EpochSampler, end_to_end, padded, target_count
from medicalgpt_cli.engine.training.losses import target_loss
from tests.held_out import held_out
from tests.tiny import tiny_model, tiny_tokenizer


def example(tokens: list[int], prompt: int = 1) -> Example:
    return Example(input_ids=tokens, labels=[-100] * prompt + tokens[prompt:], at="x:1", id=None)


EXAMPLES = [example([5, 6, 7, 8, 9], 2), example([11, 12], 1), example([21, 22, 23, 24, 25, 26, 27], 4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path_factory.mktemp("batches") / "m")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=300),
    st.integers(1, 9),
    st.integers(0, 5),
    st.booleans(),
)
def test_each_epoch_meets_every_example_once(lengths, batch_size, epoch, by_length):
    sampler = EpochSampler(lengths, batch_size, seed=3, by_length=by_length)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    again = EpochSampler(lengths, batch_size, seed=3, by_length=by_length)
    again.set_epoch(epoch)
    assert list(again) == list(sampler)


def test_epochs_differ_and_batches_are_of_similar_length():
    lengths = torch.randint(1, 500, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = EpochSampler(lengths, 4, seed=1, by_length=True)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first

    def waste(order):
        batches = [[lengths[i] for i in order[at : at + 4]] for at in range(0, len(order), 4)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    plain = EpochSampler(lengths, 4, seed=1, by_length=False)
    assert waste(first) < waste(list(plain)) / 5
    spread = [max(lengths[i] for i in first[at : at + 4]) for at in range(0, 256, 4)]
    assert spread != sorted(spread) and spread != sorted(spread, reverse=True)  # batches are shuffled


def test_a_batch_end_to_end_by_hand():
    batch = end_to_end(EXAMPLES[:2])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch["shift_labels"].tolist() == [[-100, 7, 8, 9, -100, 12, -100]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 7]
    assert target_count(EXAMPLES[:2]) == 4


def test_a_padded_batch_by_hand():
    batch = padded(EXAMPLES[:2], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [11, 12, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["shift_labels"].tolist() == [[-100, 7, 8, 9, -100], [12, -100, -100, -100, -100]]


def reference_loss(model, examples) -> float:
    """Example by example with the library's own loss, summed over tokens."""
    total = 0.0
    for one in examples:
        labels = torch.tensor([one.labels])
        count = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=torch.tensor([one.input_ids]), labels=labels).loss) * count
    return total


@pytest.mark.parametrize("layout", ["end to end", "padded"])
def test_the_loss_equals_the_librarys_example_by_example(model, layout):
    with torch.no_grad(), attention.for_batches(model, layout == "end to end"):
        batch = end_to_end(EXAMPLES) if layout == "end to end" else padded(EXAMPLES, pad_id=0)
        ours = float(target_loss(model, batch))
    assert ours == pytest.approx(reference_loss(model, EXAMPLES), abs=1e-4)


def test_gradients_do_not_depend_on_the_layout(model):
    gradients = []
    for free in (True, False):
        model.zero_grad()
        with attention.for_batches(model, free):
            target_loss(model, end_to_end(EXAMPLES) if free else padded(EXAMPLES, 0)).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    model.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_attention_is_restored_and_examples_are_isolated(model):
    before = model.config._attn_implementation
    assert attention.is_exact(model)
    assert model.config._attn_implementation == before
    with torch.no_grad(), attention.for_batches(model, True):
        one = model(**_inputs(EXAMPLES), use_cache=False).logits[0, -7:]
        changed = [example([99, 98, 97, 96, 95]), *EXAMPLES[1:]]
        two = model(**_inputs(changed), use_cache=False).logits[0, -7:]
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_own_attention_is_what_was_there_outside(model):
    """And not one of ours or the library's default: some models have a single one that computes them rightly."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with attention.for_batches(model, True):
            with attention.own(model):
                assert model.config._attn_implementation == "eager"
            assert model.config._attn_implementation == attention.NAME
        with attention.own(model):
            assert model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation(chosen)


def _inputs(examples):
    return {k: v for k, v in end_to_end(examples).items() if k not in ("labels", "shift_labels")}


def test_a_model_with_a_state_along_the_row_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    ).eval()
    assert not attention.is_exact(mamba)


def test_sliding_windows_are_kept():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    assert attention.is_exact(MistralForCausalLM(config).eval())  # its rows are longer than the window


def test_held_out_figures_by_hand(model):
    tokenizer = tiny_tokenizer()
    texts = ["感冒发烧怎么办？", "Check with your doctor."]
    examples = [example(tokenizer.encode(text) + [tokenizer.eos_token_id], 1) for text in texts]
    loss = reference_loss(model, examples)
    # Bits per byte are of the text: the end token, which has no bytes, is left out, as in pretrain.
    text = reference_loss(model, [example(one.input_ids[:-1], 1) for one in examples])
    tokens = sum(len(one.input_ids) - 1 for one in examples)
    size = sum(len(tokenizer.decode(one.input_ids[1:-1]).encode()) for one in examples)
    for batch_size in (1, 2):
        with attention.for_batches(model, True):
            found = held_out(model, examples, tokenizer, end_to_end, batch_size=batch_size)
        assert found["tokens"] == tokens and found["bytes"] == size
        assert found["loss"] == pytest.approx(loss / tokens, abs=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(text / math.log(2) / size, abs=1e-4)


def test_a_model_that_takes_no_other_attention_can_be_inside_twice() -> None:
    """GPT-J keeps its own, which tells examples apart by their positions: nothing shows that it is inside already."""
    config = GPTJConfig(
        vocab_size=60,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPTJForCausalLM(config).eval()
    assert attention.hindrance(model) is None
    with attention.for_batches(model, True):
        with attention.for_batches(model, True):
            pass
        with attention.own(model):
            assert model.config._attn_implementation == "eager"
    assert not hasattr(model, "_medgpt_own_attention")
