"""Peak memory of `medgpt rl` beside `medgpt sft` at the same batch and length, and beside separate weights.

    python tests/benchmarks/rl_memory.py MODEL [--batch-size 8] [--prompt 64] [--answer 64]

Four processes, one after the other: sft; rl whose four roles share one copy of the base; rl with a reward model of
weights of its own (a second copy); and a process that holds the weights four times, as trainers do that give
each role a model. Prints the peak of resident memory (`ru_maxrss`) of each and its ratio to sft.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MEDGPT = [sys.executable, "-m", "medicalgpt_cli"]
FOUR_COPIES = """
import sys, torch
from transformers import AutoModelForCausalLM
copies = [AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32) for _ in range(4)]
print(sum(weight.sum().item() for copy in copies for weight in copy.parameters()))
"""


def peak(command: list[object], log: Path) -> float:
    """MiB of resident memory at most, of a process that has to succeed."""
    return cost(command, log)[0]


def cost(command: list[object], log: Path) -> tuple[float, float]:
    """MiB of resident memory at most and seconds of processor time, of a process that has to succeed."""
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{log.read_text()[-2000:]}")
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="words of a prompt, about a token each")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        prompts = [
            f"Case {n}: " + "fever " * (given.prompt - 12) + "what now?" for n in range(4 * given.batch_size)
        ]
        write(place / "prompts.jsonl", [{"prompt": one} for one in prompts])
        write(place / "sft.jsonl", [{"question": one, "answer": "rest " * given.answer} for one in prompts])
        write(place / "pairs.jsonl", [{"prompt": one, "chosen": "rest", "rejected": "no"} for one in prompts])
        train = ("--base-model", given.model, "--eval-fraction", "0")

        def reward(kind: str) -> Path:
            flags = (
                "--tuning",
                kind,
                "--train-data",
                place / "pairs.jsonl",
                "--batch-size",
                "2",
                "--max-steps",
                "1",
            )
            peak([*MEDGPT, "reward", *train, *flags, "--output-dir", place / kind], place / "log")
            return place / kind

        def rl(kind: str) -> list[object]:
            flags = ("--train-data", place / "prompts.jsonl", "--batch-size", 2 * given.batch_size)
            sizes = (
                "--minibatch-size",
                given.batch_size,
                "--max-new-tokens",
                given.answer,
                "--rollout-size",
                "16",
            )
            where = ("--reward-model", reward(kind), "--max-steps", "2", "--output-dir", place / f"rl-{kind}")
            return [*MEDGPT, "rl", *train, *flags, *sizes, *where]

        sft = ("--train-data", place / "sft.jsonl", "--batch-size", given.batch_size, "--max-steps", "3")
        figures = {
            "sft": peak([*MEDGPT, "sft", *train, *sft, "--output-dir", place / "sft"], place / "log"),
            "rl, one copy": peak(rl("lora"), place / "log"),
            "rl, reward model apart": peak(rl("full"), place / "log"),
            "four copies, loaded only": peak([sys.executable, "-c", FOUR_COPIES, given.model], place / "log"),
        }
    for label, mib in figures.items():
        print(f"{label:<26} {mib:8,.0f} MiB   {mib / figures['sft']:.2f}")


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
