"""Which weights belong to which role."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertLMHeadModel

from medicalgpt_cli.engine.training.ppo.roles import POLICY, _of_adapter


def test_layers_that_are_called_like_a_role_belong_to_the_adapter_over_them() -> None:
    """BERT's attention has a layer `value`: the policy's weights over it are not the value function's."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=True,
    )
    lora = LoraConfig(r=2, target_modules=["query", "value"], use_dora=True)
    policy = get_peft_model(BertLMHeadModel(config), lora)
    policy.add_adapter("value", lora)
    ours, theirs = (_of_adapter(policy, name) for name in (POLICY, "value"))
    assert len(ours) == len(theirs) == 2 * 3  # A, B and DoRA's magnitudes of two layers
    assert not {id(weight) for weight in ours} & {id(weight) for weight in theirs}
