"""Bits per byte of a model or adapter on text by plain transformers: an independent check of `medgpt pretrain`.

    python tests/benchmarks/bits_per_byte_reference.py BASE [ADAPTER|-] DATA.jsonl WINDOW START_TOKEN

One window at a time, full logits, no code of medgpt. DATA has rows {"text"}. Every document stands behind
START_TOKEN (the end-of-text or begin-of-text token, which the run names); a window of WINDOW tokens begins with
the last token of the one before, so that each token of the text is predicted once.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def bits_per_byte(base: str, adapter: str | None, data: str, window: int, start: str) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(adapter or base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    nats, tokens, size = 0.0, 0, 0
    for line in Path(data).read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = tokenizer.encode(text, add_special_tokens=False)
        context = [tokenizer.convert_tokens_to_ids(start)]
        for begin in range(0, len(ids), window):
            piece = ids[begin : begin + window]
            with torch.no_grad():
                chances = model(input_ids=torch.tensor([context + piece[:-1]])).logits[0].log_softmax(-1)
            nats -= sum(float(chances[place, token]) for place, token in enumerate(piece))
            context = [piece[-1]]
        tokens += len(ids)
        size += len(text.encode("utf-8"))
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
    }


if __name__ == "__main__":
    base, adapter, data, window, start = sys.argv[1:]
    print(json.dumps(bits_per_byte(base, None if adapter == "-" else adapter, data, int(window), start)))
