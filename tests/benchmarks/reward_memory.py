"""Peak memory of `medgpt reward` over long pairs: as it is, recomputed, and a pair at a time.

    python tests/benchmarks/reward_memory.py MODEL --data DIR

The 8 longest pairs of `exam_pairs_zh`, two updates of 4. Prints the peak of resident memory (`ru_maxrss`), processor
seconds, and loss and gradient norm of each update, which are the same with and without recomputation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tests.benchmarks.rl_memory import MEDGPT, cost

WAYS = {
    "as it is": ("--batch-size", 4),
    "--gradient-checkpointing": ("--batch-size", 4, "--gradient-checkpointing"),
    "a pair at a time": ("--batch-size", 1, "--gradient-accumulation", 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    pairs = (given.data / "preference" / "exam_pairs_zh.jsonl").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        longest = sorted(pairs, key=len, reverse=True)[:8]
        (place / "pairs.jsonl").write_text("\n".join(longest) + "\n", encoding="utf-8")
        same = ("--base-model", given.model, "--train-data", place / "pairs.jsonl", "--eval-fraction", 0)
        for way, flags in WAYS.items():
            run = place / way.replace(" ", "-")
            command = (*MEDGPT, "reward", *same, "--max-steps", 2, "--use-cpu", *flags, "--output-dir", run)
            peak, seconds = cost(command, place / "log.txt")
            lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            steps = "  ".join(f"{line['loss']} {line['grad_norm']}" for line in lines if "loss" in line)
            print(f"{way:26} {peak:7,.0f} MiB {seconds:5.0f} s  {steps}", flush=True)


if __name__ == "__main__":
    main()
