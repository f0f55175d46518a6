"""Held-out loss beside plain transformers, where rows are longer than a model's window, chunk or index.

What only the mask of a long row knows must not be lost where examples lie end to end: such a model pads, and says so.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.evaluation.preferences import score_pairs, score_rows
from medicalgpt_cli.engine.model.reward_model import score_at_ends
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.batches import IGNORED, end_to_end, padded
from medicalgpt_cli.engine.training.reward_data import RenderedPair, padded_right, pair_layout
from tests.held_out import held_out
from tests.tiny import tiny_tokenizer

SIZES = {
    "vocab_size": 1300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"head_dim": 8, "sliding_window": 12}
MIXED = {**LOCAL, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
INDEX = {**LATENT, "index_topk": 12, "index_n_heads": 16, "index_head_dim": 16, "first_k_dense_replace": 2}
KEPT = {  # these keep examples apart in a row, however long
    "mistral": LOCAL,
    "ministral": MIXED,
    "mixtral": {"sliding_window": 12, **EXPERTS},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1, **LOCAL},
    "phi3": {"sliding_window": 12},
    "starcoder2": {"sliding_window": 12},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 8},
    "cohere2": MIXED,
    "olmo3": MIXED,
    "exaone4": MIXED,
    "smollm3": {**MIXED, "use_sliding_window": True},
    "cwm": MIXED,
    "modernbert-decoder": {"local_attention": 24, "layer_types": ["sliding_attention", "full_attention"]},
}
PADDED = {  # why these do not
    "llama4_text": (
        {"attention_chunk_size": 12, "intermediate_size_mlp": 48, "head_dim": 8},
        "only a mask knows",
    ),
    "phimoe": ({"sliding_window": 12, **EXPERTS}, "only a mask knows"),
    "qwen2_moe": (
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2, **EXPERTS},
        "only a mask knows",
    ),
    "gemma2": ({**MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0}, "softcap"),
    "vaultgemma": ({**MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0}, "softcap"),
    "gpt_oss": ({**MIXED, **EXPERTS}, "s_aux"),
    "granite_swa": (MIXED, "s_aux"),
    "deepseek_v32": (INDEX, ""),
    "glm_moe_dsa": (INDEX, ""),
}
LENGTHS = (37, 4, 21)


def made(kind: str, more: dict, head: str = "AutoModelForCausalLM"):
    import transformers

    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **more, "num_labels": 1})
    model = getattr(transformers, head).from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)  # scores that are large enough for a cap to show
    return model.requires_grad_(False)


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 1200, (length,), generator=generator).tolist() for length in LENGTHS]


def plain_loss(model, tokens: list[int]) -> float:
    """A row's loss summed over its targets, by the library alone."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum"))


def losses_agree(model) -> None:
    examples = [Example(row, [IGNORED, *row[1:]], "x:1", None) for row in rows()]
    expected = [plain_loss(model, one.input_ids) / (len(one.input_ids) - 1) for one in examples]
    apart = attention.is_exact(model)
    for packs in {False, apart}:
        lay = end_to_end if packs else partial(padded, pad_id=0)
        with attention.for_batches(model, packs):
            for one, loss in zip(examples, expected, strict=True):  # each with a neighbour that is left out
                other = Example(examples[0].input_ids, [IGNORED] * LENGTHS[0], "x:1", None)
                found = held_out(model, [other, one], tiny_tokenizer(), lay, batch_size=2)
                assert found["loss"] == pytest.approx(loss, abs=1e-5), (packs, len(one.input_ids))


@pytest.mark.parametrize("kind", KEPT)
def test_windows_are_kept_in_both_layouts(kind: str) -> None:
    model = made(kind, KEPT[kind])
    assert attention.hindrance(model) is None
    losses_agree(model)


@pytest.mark.parametrize("kind", PADDED)
def test_what_cannot_be_kept_is_padded_and_named(kind: str) -> None:
    more, why = PADDED[kind]
    model = made(kind, more)
    assert why in attention.hindrance(model)
    losses_agree(model)
    assert why in attention.hindrance(model.bfloat16())  # whose rounding would hide a cap


@pytest.mark.parametrize("kind", ["llama4_text", "qwen2_moe", "deepseek_v32"])
def test_the_same_where_the_probe_is_shorter_than_what_is_configured(kind: str) -> None:
    long = {"attention_chunk_size": 64, "sliding_window": 64, "index_topk": 64}
    more = {name: long.get(name, value) for name, value in PADDED[kind][0].items()}
    assert attention.hindrance(made(kind, more)) is not None


@pytest.mark.parametrize("kind", ["gemma2", "phimoe", "qwen2_moe", "mistral"])
def test_scores_of_pairs_are_those_of_each_answer_alone(kind: str) -> None:
    more = KEPT[kind] if kind in KEPT else PADDED[kind][0]
    model = made(kind, more, "AutoModelForSequenceClassification")
    model.forward = score_at_ends.__get__(model)
    prompt, *answers = rows()
    pair = RenderedPair([*prompt, *answers[0]], [*prompt, *answers[1]], 0.0, None, "x", "p")
    alone = score_rows(model, [pair.chosen, pair.rejected], partial(padded_right, pad_id=0), batch_size=1)
    apart = attention.is_exact(model)
    with attention.for_batches(model, apart):
        found = score_pairs(model, [pair], pair_layout(model, apart, 0), batch_size=1)
    assert [found[0][0], found[1][0]] == pytest.approx(alone, abs=1e-5)
