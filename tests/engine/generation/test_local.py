"""Answers against transformers' own `generate`, and against themselves in other company."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from medicalgpt_cli.engine.data.rendering import encode_prompt
from medicalgpt_cli.engine.generation.batching import batches_by_length
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.settings.groups import SamplingSettings
from tests.tiny import tiny_model

QUESTIONS = [
    "What are the symptoms of diabetes?",
    "感冒发烧39度怎么办？",
    "Why?",
    "高血压患者能喝酒吗？不建议饮酒，酒精会影响血压控制。糖尿病需要忌口吗？",
    "Check with your doctor if you have any of the following problems. " * 3,
    "医生您好",
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(tmp_path_factory.mktemp("generation") / "m", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def prompts(tokenizer) -> list[list[int]]:
    return [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]


def answers(loaded, ids, order=None, **sampling):
    backend = LocalBackend(*loaded, SamplingSettings(**{"max_new_tokens": 24, **sampling}))
    order = list(range(len(ids))) if order is None else order
    found = {}
    backend.answer_batch(
        [ids[i] for i in order], lambda place, answer: found.update({order[place]: answer}), numbers=order
    )
    return [found[i] for i in sorted(found)]


def reference(model, prompt, **options) -> list[int]:
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        **options,
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"no_repeat_ngram": 3}, {"no_repeat_ngram_size": 3}),
    ],
)
def test_greedy_equals_generate_one_by_one(loaded, ours, theirs):
    model, tokenizer = loaded
    ids = prompts(tokenizer)
    for prompt, answer in zip(ids, answers(loaded, ids, **ours), strict=True):
        expected = reference(model, prompt, **theirs)
        ended = expected[-1] == tokenizer.eos_token_id
        assert answer.token_ids == (expected[:-1] if ended else expected)
        assert answer.finish_reason == ("stop" if ended else "length")
        assert answer.prompt_tokens == len(prompt) and answer.completion_tokens == len(answer.token_ids)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 5}])
def test_an_answer_does_not_depend_on_its_batch(loaded, sampling):
    ids = prompts(loaded[1])
    together = [answer.token_ids for answer in answers(loaded, ids, **sampling)]
    backwards = [answer.token_ids for answer in answers(loaded, ids, [5, 3, 1, 0, 2, 4], **sampling)]
    alone = [answers(loaded, ids, [i], **sampling)[0].token_ids for i in range(len(ids))]
    assert together == backwards == alone
    assert len({tuple(one) for one in together}) > 1


def test_stream_gives_the_text_of_the_batch(loaded):
    ids = prompts(loaded[1])
    for i, answer in enumerate(answers(loaded, ids)):
        backend = LocalBackend(*loaded, SamplingSettings(max_new_tokens=24))
        pieces = list(backend.stream(ids[i]))
        assert "".join(pieces) == answer.text
        # a piece never ends in half a character; invalid bytes of a random model stand inside
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])
        assert backend.last == answer


def test_draws_follow_the_probabilities(loaded):
    """One token drawn 3,000 times against softmax(logits / temperature), by a chi-square bound."""
    model, tokenizer = loaded
    prompt = prompts(tokenizer)[0]
    backend = LocalBackend(model, tokenizer, SamplingSettings(max_new_tokens=1, temperature=0.7, top_k=5))
    drawn: Counter[int] = Counter()
    backend.answer_batch(
        [prompt] * 3000, lambda _, answer: drawn.update(answer.token_ids or [tokenizer.eos_token_id])
    )
    with torch.no_grad():
        top = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).topk(5)
    chances = top.values.softmax(-1)
    assert set(drawn) <= set(top.indices.tolist())
    statistic = sum(
        (drawn[int(token)] - 3000 * float(p)) ** 2 / (3000 * float(p))
        for token, p in zip(top.indices, chances, strict=True)
    )
    assert statistic < 18.5  # 99.9% of chi-square with 4 degrees of freedom


def test_a_stop_text_ends_and_is_cut_off(loaded):
    ids = prompts(loaded[1])
    plain = answers(loaded, ids)
    place = next(i for i, answer in enumerate(plain) if len(answer.text) > 12)
    stop = plain[place].text[6:9]
    expected = plain[place].text[: plain[place].text.index(stop)]
    stopped = answers(loaded, ids, stop=(stop,))[place]
    assert (stopped.text, stopped.finish_reason) == (expected, "stop")
    backend = LocalBackend(*loaded, SamplingSettings(max_new_tokens=24, stop=(stop,)))
    assert "".join(backend.stream(ids[place])) == expected


def test_the_context_bounds_prompt_and_answer(loaded):
    ids = prompts(loaded[1])
    shortest = min(map(len, ids))
    found = answers(loaded, ids, max_context=max(shortest + 5, 16))
    for prompt, answer in zip(ids, found, strict=True):
        if len(prompt) >= max(shortest + 5, 16):
            assert answer.finish_reason == "error" and str(len(prompt)) in answer.error
        else:
            assert answer.completion_tokens <= max(shortest + 5, 16) - len(prompt)
    assert {answer.finish_reason for answer in found} >= {"error"}
    assert any(answer.error is None for answer in found)


def test_the_first_of_several_stop_texts_counts_also_on_the_last_token(loaded):
    prompt = prompts(loaded[1])[0]
    plain = answers(loaded, [prompt])[0].text
    start = next(i for i in range(3, len(plain)) if "\ufffd" not in plain[i - 1 : i + 3])
    early, late = plain[start : start + 2], plain[start + 4 : start + 7]
    both = answers(loaded, [prompt], stop=(late, early))[0]
    assert both.text == plain[: min(plain.index(early), plain.index(late))]
    # limited to the very token that completes the stop text
    limited = answers(loaded, [prompt], stop=(late, early), max_new_tokens=both.completion_tokens)[0]
    assert (limited.text, limited.finish_reason) == (both.text, "stop")
    backend = LocalBackend(
        *loaded, SamplingSettings(max_new_tokens=24, stop=(early[0] + "\x00", late, early))
    )
    assert "".join(backend.stream(prompt)) == both.text  # nothing of a stop text was shown before


def test_an_answer_never_ends_in_half_a_character(loaded):
    """Chinese characters take several tokens here: cut anywhere, what is there is whole."""
    whole = answers(loaded, prompts(loaded[1]), max_new_tokens=24)
    seen_cut = False
    for limit in range(1, 24):
        for i, answer in enumerate(answers(loaded, prompts(loaded[1]), max_new_tokens=limit)):
            assert not answer.text.endswith("\ufffd")
            assert whole[i].text.startswith(answer.text)
            seen_cut |= loaded[1].decode(answer.token_ids).endswith("\ufffd")
    assert seen_cut


def test_a_stream_can_be_stopped_at_any_token(loaded):
    backend = LocalBackend(*loaded, SamplingSettings(max_new_tokens=24))
    pieces = backend.stream(prompts(loaded[1])[0])
    said = [next(pieces) for _ in range(5)]
    pieces.close()
    assert backend.last.completion_tokens == 5 and backend.last.text == "".join(said)


def models_of_other_families():
    """Sliding windows, positions in the attention bias, and layers with a recurrent state beside the cache."""
    import transformers

    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "head_dim": 16,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    window = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    return {
        "mistral": (transformers.MistralConfig, {**shape, "sliding_window": 16}),
        "gemma3": (transformers.Gemma3TextConfig, {**shape, **window}),
        "gpt2": (transformers.GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
        "bloom": (transformers.BloomConfig, {"hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
        "qwen3-next": (transformers.Qwen3NextConfig, {**shape, **linear}),
    }  # fmt: skip


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2", "bloom", "qwen3-next"])
def test_other_families_in_batches_equal_generate(loaded, family):
    from transformers import AutoModelForCausalLM

    tokenizer = loaded[1]
    kind, settings = models_of_other_families()[family]
    ends = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **ends, **settings)).eval()
    ids = prompts(tokenizer)
    context = max(map(len, ids)) + 5  # the longest row leaves the batch first, the others go on
    found = answers((model, tokenizer), ids, max_context=context)
    assert len({answer.completion_tokens for answer in found}) > 1
    for prompt, answer in zip(ids, found, strict=True):
        assert answer.token_ids == reference(model, prompt)[: answer.completion_tokens]


def test_batches_hold_every_prompt_once_and_similar_ones_together():
    lengths = [50, 3, 40, 7, 8, 60, 2]
    batches = list(batches_by_length(lengths, 2))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches[0] == [6, 1]
