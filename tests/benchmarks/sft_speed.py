"""Training speed of `medgpt sft` beside TRL's SFTTrainer: the same model, tokens, order, rank and number format.

    python tests/benchmarks/sft_speed.py MODEL DATA.jsonl STEPS [BATCH_SIZE] [MAX_LENGTH]

TRL is set up for the comparison as well as its own options allow: fp32 on the processor, no recomputation, batches of
similar length as ours. Both figures are target tokens a second of the updates alone, without loading or measuring.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tests.engine.training.trl_reference import our_losses, trl_history


def main() -> None:
    model, data, steps = Path(sys.argv[1]), Path(sys.argv[2]).resolve(), int(sys.argv[3])
    batch_size = sys.argv[4] if len(sys.argv) > 4 else "4"
    max_length = sys.argv[5] if len(sys.argv) > 5 else "512"
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        more = ("--batch-size", batch_size, "--max-length", max_length)
        ours = our_losses(model, data, run, steps=steps, more=more)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        ours_seconds = max(line["seconds"] for line in lines if "seconds" in line)
        history = trl_history(model, data, Path(place) / "trl", run, steps=steps)
    theirs_seconds = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    theirs = [entry["loss"] for entry in history if "loss" in entry]
    print(f"{steps} updates of {batch_size} examples, up to {max_length} tokens, {threads} threads")
    print(f"medgpt sft        {ours_seconds:8.1f} s   last loss {ours[-1]:.4f}")
    print(f"TRL SFTTrainer    {theirs_seconds:8.1f} s   last loss {theirs[-1]:.4f}")
    print(f"ratio             {theirs_seconds / ours_seconds:8.2f} ×")


if __name__ == "__main__":
    main()
