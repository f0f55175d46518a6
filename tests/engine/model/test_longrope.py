"""Models whose positions mean something else in texts beyond their original context, beside the library alone.

The reference computes each text by itself, where the library's choice for a batch is the choice for a text.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.evaluation.preferences import score_pairs, score_rows
from medicalgpt_cli.engine.generation import scheduler
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.model.longrope import choose_by_text, switches
from medicalgpt_cli.engine.model.reward_model import score_at_ends
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.batches import IGNORED, end_to_end, padded
from medicalgpt_cli.engine.training.reward_data import RenderedPair, padded_right, pair_layout
from medicalgpt_cli.settings.groups import SamplingSettings
from tests.engine.generation.test_caches import decoded, read_anew, served
from tests.held_out import held_out
from tests.tiny import tiny_tokenizer

ORIGINAL = 16  # the original context, in tokens
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": ORIGINAL,
}
SIZES = {
    "vocab_size": 1300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": ORIGINAL,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}
FAMILIES = {
    "phi3": {"rope_parameters": ROPE},
    "phi3 with a window": {"rope_parameters": ROPE, "sliding_window": 10},
    "phimoe": {
        "rope_parameters": {**ROPE, "short_mscale": 1.0, "long_mscale": 1.3},
        "num_local_experts": 4,
        "sliding_window": None,
    },
    "minicpm3": {"rope_parameters": ROPE, **LATENT},
    "llama": {"rope_parameters": ROPE},
}
# Prompt and answer: short, across the original context while it is decoded, at once beyond it, far beyond it.
PROMPTS, LIMITS = (5, 12, 16, 30), (6, 9, 7, 5)


def made(kind: str, head: str = "AutoModelForCausalLM"):
    import transformers

    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind.split()[0]](**{**SIZES, **FAMILIES[kind], "num_labels": 1})
    model = getattr(transformers, head).from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.requires_grad_(False)


def texts(lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 1200, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_do_not_depend_on_the_length_of_their_neighbours(kind: str, monkeypatch) -> None:
    library = made(kind)
    model = choose_by_text(copy.deepcopy(library))
    assert switches(model) == {ORIGINAL} and not switches(library)
    prompts = texts(PROMPTS)
    expected = [read_anew(library, *one) for one in zip(prompts, LIMITS, strict=True)]
    backend = LocalBackend(model, tiny_tokenizer(), SamplingSettings())
    backend.stop_ids = frozenset()
    assert backend.cached
    alone = [decoded(backend, [prompt], [limit])[0] for prompt, limit in zip(prompts, LIMITS, strict=True)]
    assert alone == expected
    for order in [(0, 1, 2, 3), (3, 1), (2, 0), (1, 0, 2)]:
        found = decoded(backend, [prompts[n] for n in order], [LIMITS[n] for n in order])
        assert found == [expected[n] for n in order], order
    monkeypatch.setattr(scheduler, "_PROMPT_TOKENS_A_STEP", 7)  # a piece does not show how long the whole is
    assert served(backend, prompts, list(LIMITS)) == expected
    if kind.startswith("phi"):  # the library reads the text anew where it crosses over for these alone
        for prompt, limit, answer in zip(prompts, LIMITS, expected, strict=True):
            made_by_library = library.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=None,
            )
            assert made_by_library[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_do_not_depend_on_the_length_of_their_neighbours(kind: str) -> None:
    library = made(kind)
    model = choose_by_text(copy.deepcopy(library))
    rows = texts((16, 40, 5, 17))
    assert attention.is_exact(model)
    for row in rows:
        logits = library(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
        loss = float(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:])))
        others = [Example(one, [IGNORED] * len(one), "x:1", None) for one in rows if one is not row]
        examples = [Example(row, [IGNORED, *row[1:]], "x:1", None), *others]
        for packs in (False, True):
            lay = end_to_end if packs else partial(padded, pad_id=0)
            with attention.for_batches(model, packs):
                found = held_out(model, examples, tiny_tokenizer(), lay, batch_size=4)
            assert found["loss"] == pytest.approx(loss, abs=1e-5), (packs, len(row))


def test_scores_of_two_answers_on_either_side() -> None:
    library = made("phi3", "AutoModelForSequenceClassification")
    model = choose_by_text(copy.deepcopy(library))
    for one in (library, model):
        one.forward = score_at_ends.__get__(one)
    prompt, *answers = texts((10, 4, 20))
    pair = RenderedPair([*prompt, *answers[0]], [*prompt, *answers[1]], 0.0, None, "x", "p")
    alone = score_rows(library, [pair.chosen, pair.rejected], partial(padded_right, pad_id=0), batch_size=1)
    for packs in (True, False):
        with attention.for_batches(model, packs):
            found = score_pairs(model, [pair], pair_layout(model, packs, 0), batch_size=1)
        assert [found[0][0], found[1][0]] == pytest.approx(alone, abs=1e-5)


def test_a_loaded_model_chooses_by_text(tmp_path) -> None:
    from medicalgpt_cli.engine.model.loading import load_model
    from medicalgpt_cli.engine.model.references import resolve_models
    from medicalgpt_cli.settings.groups import ModelSettings

    made("phi3").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = ModelSettings(base_model=str(tmp_path), use_cpu=True)
    assert switches(load_model(settings, resolve_models(settings))) == {ORIGINAL}
