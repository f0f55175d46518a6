"""A tiny model that knows a few answers by heart: thoughts, calls of tools and text, as its template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import render_conversation
from medicalgpt_cli.engine.data.messages import Conversation
from tests.engine.data.tool_templates import tokenizer_of

TOOLS = (
    {
        "name": "dose",
        "description": "The dose for a weight.",
        "parameters": {"type": "object", "properties": {"kg": {"type": "number"}}},
    },
)
QUESTION = {"role": "user", "content": "What dose for 40 kg?"}
CALL = {
    "role": "assistant",
    "content": "",
    "reasoning": "A weight: look it up.",
    "tool_calls": [{"name": "dose", "arguments": {"kg": 40, "drug": "扑热息痛"}}],
}
RESULT = {"role": "tool", "content": "400 mg", "name": "dose"}
ANSWER = {"role": "assistant", "content": "Take 400 mg.", "reasoning": "The tool said so."}
THOUGHT = (
    {"role": "user", "content": "Why is iron low?"},
    {"role": "assistant", "content": "Loss of blood.", "reasoning": "Iron leaves with blood."},
)
PLAIN = ({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."})
LEARNT = (
    Conversation((QUESTION, CALL, RESULT, ANSWER), "a:1", tools=TOOLS),
    Conversation(THOUGHT, "a:2"),
    Conversation(PLAIN, "a:3"),
)


def talker(folder: Path, style: str, learnt: Sequence[Conversation] = LEARNT, **more: Any) -> Path:
    """Write a model that answers the questions of `learnt` as they are answered there; gives the folder.

    Args:
        style: of a template in tests/data/templates.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_of(style)
    counts = Counts()
    examples = [one for each in learnt for one in render_conversation(tokenizer, each, 4096, counts, **more)]
    assert examples and not counts.skipped, counts.skipped
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        losses = [
            model(input_ids=torch.tensor([one.input_ids]), labels=torch.tensor([one.labels])).loss
            for one in examples
        ]
        loss = torch.stack(losses).max()
        if loss.item() < 0.02:
            break
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.05, loss.item()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
