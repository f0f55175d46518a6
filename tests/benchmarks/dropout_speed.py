"""What dropout costs a LoRA model on a processor: the library's, ours, and none, side by side.

    python tests/benchmarks/dropout_speed.py MODEL

Seconds of a forward and backward pass over 4 rows of 256 tokens, the median of five, in turn.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from medicalgpt_cli.engine.model.dropout import use_fast_dropout


def model_of(folder: str, dropout: float, fast: bool) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", lora_dropout=dropout))
    if fast:
        use_fast_dropout(model)
    return model.train()


def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return time.perf_counter() - began


def main() -> None:
    folder = sys.argv[1]
    ids = torch.randint(0, 1000, (4, 256), generator=torch.Generator().manual_seed(0))
    kinds = {"none": (0.0, False), "the library's": (0.05, False), "ours": (0.05, True)}
    models = {name: model_of(folder, *kind) for name, kind in kinds.items()}
    found = {name: [] for name in kinds}
    for _ in range(6):  # the first round warms up
        for name, model in models.items():
            found[name].append(seconds(model, ids))
    for name, times in found.items():
        middle = statistics.median(times[1:])
        print(f"{name:<14} {middle:6.2f} s   {middle / statistics.median(found['none'][1:]):.2f}")


if __name__ == "__main__":
    main()
