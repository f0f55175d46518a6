"""What `medgpt plan` says a stage needs beside what the stage needed: peak memory, a process a row.

    python tests/benchmarks/plan_memory.py MODEL --data DIR [--only WORD …]

Each row runs `medgpt plan STAGE … --json` and then the stage itself with the same flags, for three updates of batches
that are full. The peak is that of resident memory (`ru_maxrss`). The second model has random weights: 12 layers of
another width and another architecture (Qwen2). `--only` takes rows with any of the words; some rows go on from others:
`--only new reward rl`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.rl_memory import MEDGPT, cost, write

SMALL = {
    "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 49152,
    "max_position_embeddings": 8192,
}  # fmt: skip
STEPS = ("--max-steps", 3, "--eval-fraction", 0, "--use-cpu")
Row = tuple[str, str, tuple[Any, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""])
    given = parser.parse_args()
    print(f"{'':36} predicted  measured  ratio  MiB", flush=True)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        texts(given.data.resolve(), place)
        for label, stage, flags in rows(given.model, given.data.resolve(), place):
            out = place / label.replace(" ", "-").replace(",", "")
            if not any(word in label for word in given.only):
                continue
            asked = [*MEDGPT, "plan", stage, *flags, "--throughput", 1, "--json"]
            done = subprocess.run(list(map(str, asked)), capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{label}: {done.stderr[-1000:]}")
            predicted = json.loads(done.stdout[done.stdout.index("{") :])["memory"]["peak"] / 2**20
            result = ("--predictions-file", f"{out}.json") if stage == "infer" else ("--output-dir", out)
            measured, _ = cost([*MEDGPT, stage, *flags, *result], place / "log.txt")
            print(f"{label:36} {predicted:9,.0f} {measured:9,.0f} {predicted / measured:6.2f}", flush=True)


def texts(data: Path, place: Path) -> None:
    """Examples that fill any length asked for here, of real answers."""
    lines = (data / "sft/medquad_en_alpaca.jsonl").read_text(encoding="utf-8").splitlines()[:160]
    records = [json.loads(line) for line in lines]
    answers = [one["output"] for one in records]
    long = [" ".join(answers[n : n + 8]) for n in range(0, 152, 2)]
    write(place / "sft.jsonl", [{"question": "What is known?", "answer": text} for text in long])
    pairs = [(" ".join(text.split()[:300]), " ".join(text.split()[300:600])) for text in long]
    write(
        place / "pairs.jsonl",
        [
            {"prompt": f"{n}?", "chosen": a, "rejected": b}
            for n, (a, b) in enumerate(pairs)
            if len(b.split()) == 300
        ],
    )
    write(place / "prompts.jsonl", [{"prompt": " ".join(text.split()[:90]) + "?"} for text in long])
    asked = [" ".join(text.split()[:170]) for text in long]  # about 256 tokens each
    write(place / "asked.jsonl", [{"question": text} for text in asked[:64]])
    config = place / "config.json"
    config.write_text(json.dumps(SMALL), encoding="utf-8")


def rows(model: str, data: Path, place: Path) -> Iterator[Row]:
    sft = (*STEPS, "--train-data", place / "sft.jsonl")
    first = ("--base-model", model)
    four = (*first, *sft, "--batch-size", 4)
    yield "sft, LoRA, 4 x 512", "sft", (*four, "--max-length", 512)
    yield "sft, LoRA, 2 x 256", "sft", (*first, *sft, "--batch-size", 2, "--max-length", 256)
    yield "sft, LoRA, padded, 4 x 256", "sft", (*four, "--max-length", 256, "--layout", "padded")
    yield "sft, LoRA, recomputed, 4 x 512", "sft", (*four, "--max-length", 512, "--gradient-checkpointing")
    yield "sft, full, 4 x 256", "sft", (*four, "--max-length", 256, "--tuning", "full")
    yield "sft, LoRA over 8 bits, 4 x 256", "sft", (*four, "--max-length", 256, "--load-in-8bit")
    yield "sft, LoRA over 4 bits, 4 x 256", "sft", (*four, "--max-length", 256, "--load-in-4bit")
    books = (*STEPS, "--train-data", data / "pretrain/openstax_en_sample.txt", "--block-size", 512)
    yield "pretrain, LoRA, 2 x 512", "pretrain", (*first, *books, "--batch-size", 2)
    yield "pretrain, full, 2 x 512", "pretrain", (*first, *books, "--batch-size", 2, "--tuning", "full")
    tokenizer = ("--from-config", place / "config.json", "--tokenizer-path", model)
    small = place / "pretrain-new-small-4-x-512" / "model"
    yield "pretrain, new, small, 4 x 512", "pretrain", (*tokenizer, *books, "--batch-size", 4)
    yield (
        "sft, LoRA, small, 8 x 512",
        "sft",
        (*("--base-model", small, *sft, "--batch-size", 8, "--max-length", 512),),
    )
    pairs = (*STEPS, "--train-data", place / "pairs.jsonl", "--batch-size", 2, "--max-length", 512)
    yield "reward, LoRA, 2 x 512", "reward", (*first, *pairs)
    asked = ("--train-data", place / "prompts.jsonl", "--eval-fraction", 0, "--use-cpu", "--max-steps", 2)
    sizes = ("--batch-size", 8, "--minibatch-size", 8, "--max-prompt-length", 256, "--max-new-tokens", 64)
    once = ("--ppo-epochs", 1, *asked, *sizes)
    reward = ("--reward-model", place / "reward-LoRA-2-x-512")
    yield "rl, four roles over one base", "rl", (*first, *reward, *once)
    own = ("--reward-model", place / "reward-full-small")
    yield "reward, full, small", "reward", ("--base-model", small, *pairs, "--tuning", "full")
    yield "rl, reward model apart", "rl", (*first, *own, *once)
    full = (*first, *sft, "--batch-size", 2, "--max-length", 256, "--tuning", "full", "--processes", 2)
    for way in ("ddp", "zero2", "zero3"):
        yield f"sft, full, 2 x 256, two in {way}", "sft", (*full, "--parallel", way)
    answers = (*first, "--data-file", place / "asked.jsonl", "--max-new-tokens", 64, "--use-cpu")
    for size in (8, 32):
        yield f"infer, {size} x 256 and answers of 64", "infer", (*answers, "--batch-size", size)


if __name__ == "__main__":
    main()
