"""A task for PPO with a known reward, the share of an answer's tokens that are wanted ones, as a reward model.

It is an ordinary sequence-classification folder with weights made by hand, so that any library can score with it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForSequenceClassification


def counting_reward_model(folder: Path, model: Path, wanted: list[int], prompt: int, answer: int) -> Path:
    """An ordinary LlamaForSequenceClassification that scores (wanted tokens of the row) / `answer`.

    One layer whose attention is uniform averages an indicator over the row. Each embedding has a large constant,
    so that the norms divide by nearly the same number everywhere: the score is right to some 1e-4.

    Args:
        prompt: tokens of every prompt, none of them wanted. answer: tokens of a whole answer.
    """
    width, large = 16, 100.0
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    net = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=4, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, num_labels=1, pad_token_id=0,
        )
    )  # fmt: skip
    scale = large / width**0.5  # what a norm divides by
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        layer = net.model.layers[0].self_attn
        net.model.embed_tokens.weight[:, 1] = large
        net.model.embed_tokens.weight[wanted, 0] = 1.0
        layer.v_proj.weight[0, 0] = scale
        layer.o_proj.weight[2, 0] = 1.0
        net.score.weight[0, 2] = scale * (prompt + answer) / answer
    net.save_pretrained(folder)
    return folder
