"""Held-out loss of a model or adapter by plain transformers: an independent check of what medgpt reports.

    python tests/benchmarks/held_out_reference.py BASE [ADAPTER|-] DATA.jsonl MAX_LENGTH

One question at a time, full logits, no code of medgpt. DATA has rows {"question", "reference"}; the prompt is the
chat template's, the target is the answer and the end-of-turn token, cut at MAX_LENGTH tokens.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def held_out_loss(base: str, adapter: str | None, data: str, max_length: int) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(adapter or base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    nats, of_text, tokens, size = 0.0, 0.0, 0, 0
    for line in Path(data).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        target = tokenizer.encode(row["reference"], add_special_tokens=False) + [tokenizer.eos_token_id]
        target = target[: max_length - len(prompt)]
        ids = torch.tensor([prompt + target])
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0].log_softmax(-1)
        for place, token in enumerate(target, len(prompt)):
            nats -= float(chances[place - 1, token])
            if token not in tokenizer.all_special_ids:  # which have no bytes
                of_text -= float(chances[place - 1, token])
        tokens += len(target)
        size += len(tokenizer.decode(target, skip_special_tokens=True).encode())
    return {
        "loss": nats / tokens,
        "bits_per_byte": of_text / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
    }


if __name__ == "__main__":
    base, adapter, data, max_length = sys.argv[1:]
    print(json.dumps(held_out_loss(base, None if adapter == "-" else adapter, data, int(max_length))))
