"""Tokens a second, model FLOPs utilisation and peak memory of `medgpt sft` beside TRL's SFTTrainer, on a GPU.

    python tests/benchmarks/gpu_speed.py MODEL DATA.jsonl --peak-tflops 989 --flags='--attention flash2 --liger'
    python tests/benchmarks/gpu_speed.py MODEL DATA.jsonl --tuning full --flags='--compile --fp8'
    python tests/benchmarks/gpu_speed.py MODEL DATA.jsonl --use-cpu --steps 4      # only to see that it runs

Both train on the same tokens in the same order, from the same weights, in the same number format; each in a process of
its own. TRL gets the options of its own that mean the same as `--flags` (padding-free batches need its flash
attention). The first updates (`--warm-up`) are not counted: there kernels are compiled and memory is laid out.

Utilisation: 6 FLOPs a token and weight where all weights learn, 4 with LoRA, whose base has no weight gradient
(Chowdhery et al. 2022, appendix B, without its attention term), over `--peak-tflops`, the GPU's dense bf16 figure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

# What TRL calls our flags.
_THEIRS = {"--liger": {"use_liger_kernel": True}, "--compile": {"torch_compile": True}}
_ATTENTION = {"flash2": "flash_attention_2", "flash3": "flash_attention_3", "sdpa": "sdpa", "eager": "eager"}


def main() -> None:
    given = _arguments()
    os.environ["GLIBC_TUNABLES"] = (
        "glibc.malloc.tcache_count=0"  # else training starts itself anew, and loses our pipe
    )
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for who, side in (("medgpt sft", _ours), ("TRL SFTTrainer", _theirs)):
            process = multiprocessing.get_context("spawn").Process(target=side, args=(given, place))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{who} failed")
        ours, theirs = (json.loads((place / file).read_text()) for file in ("ours.json", "theirs.json"))
    tokens = theirs["tokens"]
    flops = (6 if given.tuning == "full" else 4) * theirs["weights"]
    print(
        f"{given.steps} updates of {given.batch_size} examples up to {given.max_length} tokens; {given.flags}"
    )
    speeds = []
    for who, side in (("medgpt sft", ours), ("TRL SFTTrainer", theirs)):
        seconds = side["seconds"][-1] - side["seconds"][given.warm_up - 1]
        speeds.append(sum(tokens[given.warm_up :]) / seconds)
        peak = given.peak_tflops
        used = f"{100 * flops * speeds[-1] / (peak * 1e12):5.1f} %" if peak else "    –"
        print(
            f"{who:15} {speeds[-1]:10.0f} tokens/s   utilisation {used}   peak {side['peak'] / 2**20:8.0f} MiB"
            f"   last loss {side['losses'][-1]:.4f}"
        )
    print(f"ratio           {speeds[0] / speeds[1]:10.2f} ×")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data", type=lambda text: Path(text).resolve())
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5, help="updates that are not counted")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--flags", default="", help="of medgpt sft, such as '--attention flash2 --liger'")
    parser.add_argument(
        "--peak-tflops", type=float, help="dense bf16 TFLOP/s of the GPU, from its data sheet"
    )
    parser.add_argument("--use-cpu", action="store_true")
    given = parser.parse_args()
    given.warm_up = min(given.warm_up, given.steps - 1)
    return given


def _ours(given: argparse.Namespace, place: Path) -> None:
    from medicalgpt_cli.app import main as medgpt

    tuning = () if given.tuning == "full" else ("--lora-dropout", "0")
    sys.argv = [
        *("medgpt", "sft", "--base-model", given.model, "--train-data", str(given.data)),
        *("--eval-fraction", "0", "--output-dir", str(place / "run"), "--tuning", given.tuning, *tuning),
        *("--max-steps", str(given.steps), "--save-steps", str(given.steps)),
        *("--batch-size", str(given.batch_size), "--max-length", str(given.max_length)),
        *given.flags.split(),
        *(("--use-cpu",) if given.use_cpu else ()),
    ]
    try:
        medgpt()
    except SystemExit as end:
        if end.code:
            raise
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    figures = {"seconds": [line["seconds"] for line in lines], "losses": [line["loss"] for line in lines]}
    (place / "ours.json").write_text(json.dumps({**figures, "peak": _peak(given)}))


def _theirs(given: argparse.Namespace, place: Path) -> None:
    import time

    import torch
    from transformers import TrainerCallback

    from medicalgpt_cli.engine.model.references import resolve
    from tests.engine.training.trl_reference import rows_of_run, trl_history

    seconds: list[float] = []
    weights: list[int] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            weights.append(sum(weight.numel() for weight in model.parameters()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not given.use_cpu:
                torch.cuda.synchronize()
            seconds.append(time.monotonic())

    words = given.flags.split()
    options: dict[str, Any] = {}
    for flag in words:
        options |= _THEIRS.get(flag, {})
    loading: dict[str, Any] = {}
    if "--attention" in words:
        named = _ATTENTION.get(words[words.index("--attention") + 1])
        loading |= {"attn_implementation": named} if named else {}
        options["padding_free"] = bool(named and "flash" in named)
    if not given.use_cpu:
        half = given.tuning == "lora"  # weights that all learn are held in fp32, as ours are
        loading["dtype"] = torch.bfloat16 if half else torch.float32
        options |= {"use_cpu": False, "bf16": True}
    history = trl_history(
        resolve(given.model).path, given.data, place / "trl", place / "run", steps=given.steps, loading=loading,
        callbacks=(Clock(),), **options,
    )  # fmt: skip
    losses = [entry["loss"] for entry in history if "loss" in entry]
    figures = {"seconds": seconds, "losses": losses, "peak": _peak(given), "weights": weights[0]}
    lengths = [len(row["input_ids"]) for row in rows_of_run(given.data, place / "run")[0]]
    starts = range(0, given.steps * given.batch_size, given.batch_size)
    tokens = [sum(lengths[start : start + given.batch_size]) for start in starts]
    (place / "theirs.json").write_text(json.dumps({**figures, "tokens": tokens}))


def _peak(given: argparse.Namespace) -> int:
    """Bytes: of tensors on the GPU, else of the process."""
    if given.use_cpu:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import torch

    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
