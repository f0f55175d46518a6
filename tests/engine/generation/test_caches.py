"""Answers of models that keep more than keys and values, or nothing that is known as a cache.

The reference reads the whole text anew for each token, one row at a time; `generate` agrees with it where it can.
"""

from __future__ import annotations

import threading

import pytest
import torch

from medicalgpt_cli.engine.generation.decoding import Row, Sampler, caches_exactly
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.generation.scheduler import Limits, Scheduler
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.groups import SamplingSettings
from tests.tiny import tiny_tokenizer

SIZE = {"vocab_size": 1300, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
FAMILIES = {
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "jamba": {
        **HEADS,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "use_mamba_kernels": False,
    },
    "bamba": {**HEADS, **MAMBA2, "attn_layer_indices": [1]},
    "zamba2": {
        **HEADS,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "chunk_size": 8,
        "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
    "falcon_h1": {**HEADS, **MAMBA2, "mamba_d_ssm": 64},
    "nemotron_h": {
        **HEADS,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {
        **HEADS,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "recurrent_gemma": {
        **HEADS,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "minimax": {
        **HEADS,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 8,
    },
    "gemma2": {**HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8},
}
# No cache of the library's kind (RWKV, MiniMax), a state that padding or a row that leaves spoils (RecurrentGemma keeps
# it in the layers), or a step with a cache that fails (xLSTM).
UNCACHED = {"xlstm", "rwkv", "minimax", "recurrent_gemma"}
LENGTHS, LIMITS = (11, 3, 19), (7, 10, 4)


def made(kind: str):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        **{**SIZE, **FAMILIES[kind]}, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and not name.endswith("A_log"):
            torch.nn.init.normal_(weight, std=0.2)  # answers that hang on what was read
    return model.requires_grad_(False)


def read_anew(model, prompt: list[int], limit: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(limit):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def decoded(backend: LocalBackend, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
    greedy = Sampler(SamplingSettings())
    rows = [
        Row(n, prompt, limit, greedy, None)
        for n, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    for _ in backend._run(rows):
        pass
    return [row.said for row in rows]


def served(backend: LocalBackend, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
    scheduler, done = Scheduler(backend, Limits()), [threading.Event() for _ in prompts]
    found: dict[int, list[int]] = {}
    try:
        for n, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):

            def deliver(_, answer, n: int = n) -> None:
                if answer is not None:
                    found[n] = answer.token_ids
                    done[n].set()

            scheduler.submit(prompt, SamplingSettings(max_new_tokens=limit), deliver)
        assert all(one.wait(60) for one in done)
    finally:
        scheduler.close()
    return [found[n] for n in range(len(prompts))]


class Heard(Observer):
    def __init__(self) -> None:
        self.notices: list[str] = []

    def on_notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_alone_in_a_batch_and_served_are_those_of_reading_anew(kind: str) -> None:
    model, tokenizer, heard = made(kind), tiny_tokenizer(), Heard()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 1200, (length,), generator=generator).tolist() for length in LENGTHS]
    expected = [read_anew(model, *one) for one in zip(prompts, LIMITS, strict=True)]
    assert len({tuple(one) for one in expected}) == 3
    backend = LocalBackend(model, tokenizer, SamplingSettings(), heard)
    backend.stop_ids = frozenset()
    assert decoded(backend, prompts, list(LIMITS)) == expected
    alone = [decoded(backend, [prompt], [limit])[0] for prompt, limit in zip(prompts, LIMITS, strict=True)]
    assert alone == expected
    assert served(backend, prompts, list(LIMITS)) == expected
    assert backend.cached == (kind not in UNCACHED)
    LocalBackend(model, tokenizer, SamplingSettings(), heard)
    assert len(heard.notices) == (kind in UNCACHED)  # once
    if kind == "xlstm":  # the library's `generate` fails on it
        return
    made_by_library = model.generate(
        torch.tensor(prompts[:1]),
        attention_mask=torch.ones(1, LENGTHS[0], dtype=torch.long),
        max_new_tokens=LIMITS[0],
        do_sample=False,
        eos_token_id=None,
    )
    assert made_by_library[0, LENGTHS[0] :].tolist() == expected[0]


def test_a_cache_that_is_wrong_is_not_used() -> None:
    """A model that loses its state between two steps: the answers are right all the same."""
    model, tokenizer = made("mamba"), tiny_tokenizer()
    forward = type(model).forward

    class Forgetful(type(model)):
        def forward(self, input_ids=None, cache_params=None, logits_to_keep=0, **more):
            return forward(self, input_ids, logits_to_keep=logits_to_keep, **more)

    model.__class__ = Forgetful
    assert not caches_exactly(model, tokenizer)
    backend = LocalBackend(model, tokenizer, SamplingSettings())
    assert decoded(backend, [[5, 6, 7]], [5]) == [read_anew(model, [5, 6, 7], 5)]
