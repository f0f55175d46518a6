"""Every stage over weights in fp32, 8 and 4 bits: losses side by side, peak memory and processor time of each.

    python tests/benchmarks/quantization.py MODEL --data DIR [--steps 10]

A process a stage and format: sft on MedQuAD, reward and rl over its adapter, and infer with it. Prints what each
measured on held-out data before and after, the peak of resident memory (`ru_maxrss`) and its ratio to fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tests.benchmarks.rl_memory import MEDGPT, cost

FORMATS = {"fp32": (), "8bit": ("--load-in-8bit",), "4bit": ("--load-in-4bit",)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    data = given.data.resolve()
    plain: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        questions = (data / "sft" / "medquad_en_alpaca.jsonl").read_text(encoding="utf-8").splitlines()[-4:]
        (place / "ask.txt").write_text(
            "\n".join(json.loads(line)["instruction"] for line in questions) + "\n"
        )
        for kind, flags in FORMATS.items():
            for stage, arguments in stages(place / kind, given.model, data, given.steps).items():
                ask = (*MEDGPT, stage, *arguments, *flags, "--use-cpu")
                peak, seconds = cost(ask, place / "log.txt")
                plain.setdefault(stage, peak)
                print(
                    f"{stage:7} {kind:5} {peak:6.0f} MiB {peak / plain[stage]:5.2f} {seconds:6.0f} s  "
                    f"{figures(place / kind / stage)}",
                    flush=True,
                )


def stages(place: Path, model: str, data: Path, steps: int) -> dict[str, tuple[object, ...]]:
    train = ("--max-steps", steps, "--batch-size", 4, "--max-samples", 240)
    sft, reward, prompts = (place / one for one in ("sft", "reward", "ask"))
    return {
        "sft": (
            *(
                "--base-model",
                model,
                "--train-data",
                data / "sft/medquad_en_alpaca.jsonl",
                "--max-length",
                256,
            ),
            *("--eval-questions", 0, "--output-dir", sft, *train),
        ),
        "reward": (
            *("--lora-model", sft, "--train-data", data / "preference/medquad_synth_pairs_en.jsonl"),
            *("--max-length", 256, "--eval-fraction", 0.1, "--output-dir", reward, *train),
        ),
        "rl": (
            *("--lora-model", sft, "--reward-model", reward, "--max-steps", 2, "--batch-size", 8),
            *("--train-data", data / "preference/ppo_prompts_en.jsonl", "--max-samples", 240),
            *("--minibatch-size", 4, "--max-new-tokens", 32, "--max-prompt-length", 128, "--eval-prompts", 8),
            *("--output-dir", place / "rl"),
        ),
        "infer": (
            *("--lora-model", sft, "--data-file", place.parent / "ask.txt", "--max-new-tokens", 48),
            *("--predictions-file", prompts.with_suffix(".jsonl")),
        ),
    }


def figures(run: Path) -> str:
    if not (run / "run.json").is_file():
        return ""
    result = json.loads((run / "run.json").read_text(encoding="utf-8"))["result"]
    names = ("loss", "reward", "kl")
    return "  ".join(
        f"{name} {result['before'][name]:.4f} -> {result['after'][name]:.4f}"
        for name in names
        if isinstance(result["before"].get(name), float)
    )


if __name__ == "__main__":
    main()
