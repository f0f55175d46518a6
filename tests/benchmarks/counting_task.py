"""A task for PPO whose reward model is made by hand and whose optimum is computed.

The reward is the share of an answer's tokens that are wanted ones. `counting_reward_model` writes it as an ordinary
sequence-classification folder, so that any library can score with it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification


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


def optimum(model: Path, prompts: list[list[int]], wanted: list[int], shape: dict) -> tuple[float, float]:
    """Reward and KL of an answer under pi ∝ ref · exp(reward / beta), from answers drawn from the start.

    Importance weights exp(reward / beta) over many draws; an end of an answer counts as any token.
    """
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.manual_seed(0)
    rows = torch.tensor(prompts).repeat(4096 // len(prompts), 1)
    drawn = net.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        do_sample=True,
        top_k=0,
        max_new_tokens=shape["max_new_tokens"],
    )[:, rows.shape[1] :]
    reward = torch.isin(drawn, torch.tensor(wanted)).float().mean(1).double()
    log_weight = reward / shape["kl_coefficient"]
    # Every prompt has an optimum of its own.
    log_weight = log_weight.view(-1, len(prompts))
    weight = (log_weight - log_weight.logsumexp(0)).exp()
    kl = (weight * (log_weight - log_weight.logsumexp(0) + math.log(len(weight)))).sum(0).mean()
    return float((weight * reward.view_as(weight)).sum(0).mean()), float(kl)
