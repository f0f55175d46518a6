"""Tiny configurations of every causal architecture that the installed transformers lists.

The library's default configuration of a model type is shrunk by the names of its settings: a few layers, one of each
kind that the architecture has, a few heads and experts, and windows, chunks and indexes that are shorter than the rows
of the tests. `_HINTS` says what names do not.
"""

from __future__ import annotations

import re
from typing import Any

LAYERS, HIDDEN, HEADS, HEAD_SIZE = 4, 64, 4, 16
WINDOW = 16  # tokens; the rows of the tests are longer
CONTEXT = 512

# The first expression that matches a whole name gives the value. A value that is smaller already stays.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"num_kv_shared_layers|num_nextn_predict_layers|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(num_hidden|num|n|decoder|encoder|num_decoder|num_encoder|num_hidden_text)_layers?|n_layers?", LAYERS),
    (r"num_layers_per_stack|num_blocks|depth", 2),
    (r"H_cycles|L_cycles", 1),
    (r"(num_|swa_num_|linear_num_)?(key_value_heads|kv_heads|key_heads|query_groups)|n_kv_heads", 2),
    (r"(swa_)?num_attention_heads|(num_)?attention_heads|n_heads?|(num|decoder|encoder)(_\w+)?_attention_heads", HEADS),
    (r"num_heads|linear_num_heads|linear_num_value_heads|linear_num_key_heads", HEADS),
    (r"index_n_heads", 32),  # with few, many scores are 0, and which of equal ones is taken is left to chance
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"n_mamba_heads|mamba_n_groups|mamba_ngroups|n_groups|o_groups", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_nope_head_dim", 8),
    (r"(swa_)?head_dim|global_head_dim|v_head_dim|qk_head_dim|kv_channels|d_head|d_kv|attention_head_size", HEAD_SIZE),
    (r"dim_head|mamba_d_head|mamba_head_dim|linear_(key_|value_)?head_dim|index_head_dim", HEAD_SIZE),
    (r"(\w+_)?(lora_rank|rank)|mamba_dt_rank|time_step_rank|hc_lowrank", 8),
    (r"hidden_size_per_layer_input|d_rel|gated_norm_rank", 16),
    (r"query_pre_attn_scalar", HEAD_SIZE),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|zero_expert_num", 2),
    (r"(\w*_)?(state_size|d_state|n_state|state_dim)", 8),
    (r"((sliding|attention|keep)_)?window(_size)?|local_attention\w*", WINDOW),
    (r"attention_chunk_size|index_topk|rel_extent|index_block_size", WINDOW),
    (r"(mamba_|ssm_)?chunk_size", 8),
    (r"base_channels", 32),
    (r"codebook_size", 64),
    (r"(\w+_)?(vocab_size)(_\w+)?", 0),  # replaced by the tokenizer's
    (r"max_position_embeddings|n_positions|max_seq_len|max_target_positions|context_length|n_ctx|seq_length", CONTEXT),
    (r"(word_|text_)?embed(ding)?s?_(proj_)?(dim|size)|emb_dim|ple_embed_dim|(in|out)put_embedding_size", HIDDEN),
    (r"adapter_(in_dim|out_dim|input_size)|hidden_size_global", HIDDEN),
    (r"(\w+_)?(hidden_size|hidden_dim|width|d_ssm)|d_model|n_embd|dim", HIDDEN),
    (r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size|_ff|d_inner|n_inner)\w*|dff|d_inner|dim_ff", 96),
)  # fmt: skip
_PATTERNS = [(re.compile(pattern), value) for pattern, value in _SIZES]

# What a name does not say; a setting whose hint is None is left to the library.
_HINTS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 300},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {
        "num_key_value_heads": HEADS,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": HEAD_SIZE,
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "attention_layers": None},
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "emu3": {"vocabulary_map": {"<image>": 1300, **{f"<|visual token {n:06}|>": 1301 + n for n in range(8)}}},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 32,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_SIZE,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_SIZE},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_SIZE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}
# Of these none can be made, and why.
NOT_ALONE = {
    "gemma4_assistant": "it drafts for another model, and computes nothing without that model's states",
    "gemma4_unified_assistant": "it drafts for another model, and computes nothing without that model's states",
    "musicgen": "it predicts codes of sound, and the library builds no language model of its configuration",
    "musicgen_melody": "it predicts codes of sound, and the library builds no language model of its configuration",
}
# What the library leaves open by default, and then fails without.
_OPEN = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "head_dim": HEAD_SIZE,
    "sliding_window": WINDOW,
}


def tiny_config(model_type: str, vocabulary: int, end: int) -> Any:
    """A small configuration of `model_type` for a tokenizer of `vocabulary` tokens whose texts end with `end`.

    Raises:
        ValueError: there is none (`NOT_ALONE`).
        Exception: whatever the library says against it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type in NOT_ALONE:
        raise ValueError(NOT_ALONE[model_type])
    kind = CONFIG_MAPPING[model_type]
    hints = _HINTS.get(model_type, {})
    wanted = {**_small(kind(), vocabulary, end), **hints}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    try:
        return kind(**wanted)
    except Exception:
        # Lists of one value a layer may have to fit others that the library makes by itself.
        return kind(**{n: v for n, v in wanted.items() if not isinstance(v, list) or n in hints})


def _small(config: Any, vocabulary: int, end: int) -> dict[str, Any]:
    """Settings that make `config` small, with those of its parts."""
    parts = {name: getattr(config, name, None) for name in getattr(type(config), "sub_configs", {})}
    found: dict[str, Any] = {
        name: {**_small(part, vocabulary, end), **_HINTS.get(part.model_type, {})}
        for name, part in parts.items()
        if hasattr(part, "to_dict")
    }
    given = {name: value for name, value in config.to_dict().items() if name not in found}
    layers = given.get("num_hidden_layers")
    beyond = 0
    for name, value in given.items():
        if isinstance(value, bool):
            continue
        if name == "pad_token_id" and isinstance(value, int) and value < CONTEXT:
            continue  # some count positions from it
        if name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id"):
            found[name] = end
        elif isinstance(value, int) and re.fullmatch(r"\w+_(token_id|token_index|index)", name):
            beyond += 1
            found[name] = min(value, vocabulary + beyond)  # no token of a text
        elif isinstance(value, int):
            small = _smaller(name, value, vocabulary)
            if small is not None:
                found[name] = small
        elif isinstance(value, list) and layers and len(value) == layers:
            found[name] = _one_of_each([_smaller(name, one, vocabulary) or one for one in value])
        elif isinstance(value, float) and "dropout" in name:
            found[name] = 0.0
        elif value is None and name in _OPEN:
            found[name] = _OPEN[name]
    if "qk_rope_head_dim" in given:  # heads of two parts, one of which has positions
        found |= {"num_key_value_heads": HEADS}
        if "head_dim" in given:
            found["head_dim"] = 8
    if given.get("use_sliding_window") is False:
        found["use_sliding_window"] = True
        if found.get("sliding_window") == 0:  # which is how some say that there is none
            found["sliding_window"] = WINDOW
    if "max_window_layers" in given:
        found["max_window_layers"] = LAYERS // 2
    if "sliding_window" in given and set(found.get("layer_types", [])) == {"full_attention"}:
        found["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    if "is_decoder" in given:
        found["is_decoder"] = True
    for name in ("initializer_range", "init_std"):
        if isinstance(given.get(name), float):
            found[name] = 0.2
    return found


def _smaller(name: str, value: Any, vocabulary: int) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    for pattern, small in _PATTERNS:
        if pattern.fullmatch(name):
            if "vocab_size" in name:  # with room for tokens that no text has
                return vocabulary + 40 if name == "vocab_size" else min(value, vocabulary + 40)
            return min(value, small)
    return None


def _one_of_each(values: list[Any]) -> list[Any]:
    """A list of one value a layer, so short that every value stands in it."""
    first = list({str(one): one for one in values}.values())
    return [first[place % len(first)] for place in range(LAYERS)]
