"""Tiny configurations of architectures that differ from Llama: layers of several kinds, states, experts, wrappers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_SIZES = {
    "vocab_size": 1280,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# What a family has beside the sizes above; a value of None takes a size away.
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "cohere2": {**_ALTERNATING, "sliding_window": 8},
    "deepseek_v3": {
        **_EXPERTS,
        **_LATENT,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5": {},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    "gemma3n_text": {
        **_ALTERNATING,
        "vocab_size_per_layer_input": 1280,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8,
    },
    "gemma3_text": {},
    "gemma4_text": {
        **_ALTERNATING,
        "sliding_window": 8,
        "vocab_size_per_layer_input": 1280,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
    },
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
                 "n_group": 1, "topk_group": 1},
    "gpt_oss": {**_ALTERNATING, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {},
    "internlm3": {},
    "jamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama": {},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 1, 0],
        "attention_chunk_size": 16,
    },
    "mamba": {"state_size": 8, "time_step_rank": 8, "num_attention_heads": None},
    "mamba2": {"state_size": 16, "num_heads": 8, "n_groups": 1, "num_attention_heads": None},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "num_hidden_layers": None,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": {**_LINEAR, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
        "head_dim": None,
    },
}  # fmt: skip


def family(name: str, **more: Any) -> Any:
    """The configuration of a tiny model of a family; "gemma3", "llama4" and "gemma4" are wrappers with more senses."""
    if name == "gemma3":
        text = family("gemma3_text", **more).to_dict()
        vision = {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    if name in ("gemma4", "llama4"):
        return AutoConfig.for_model(name, text_config=family(f"{name}_text", **more).to_dict())
    sizes = {**_SIZES, **FAMILIES.get(name, {}), **more}
    return AutoConfig.for_model(name, **{key: value for key, value in sizes.items() if value is not None})
