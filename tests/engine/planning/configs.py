"""Configurations of known models, as their config.json has them."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, Qwen2Config

_LLAMA2 = {"vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096}
# width, MLP, layers, heads, heads of keys and values
_SIZES = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "33B": (6656, 17920, 60, 52, 52),
    "65B": (8192, 22016, 80, 64, 64),
    "70B": (8192, 28672, 80, 64, 8),
}


def llama(size: str) -> Any:
    """LLaMA (Touvron et al. 2023): 33B and 65B; Llama 2: 7B, 13B and 70B."""
    width, mlp, layers, heads, pairs = _SIZES[size]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        **_LLAMA2,
    )


def qwen_7b() -> Any:
    """Qwen2.5-7B."""
    return Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
