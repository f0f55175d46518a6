"""PPO on a reward of 20 ± 1: whether the level of a reward, which says nothing, keeps it from being learnt.

    python -m tests.benchmarks.constant_reward [--seeds 3] [--steps 40]

A tiny model answers in 8 tokens; wanted are those whose id is a multiple of four, a quarter by chance. Prints a row a
seed: the wanted share on held-out prompts before and after, and the mean explained variance of the last ten steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.loop import run
from medicalgpt_cli.engine.training.ppo import trainer
from tests.engine.training.ppo.test_learning import Known, settings_of, wanted_share
from tests.tiny import tiny_model, write_jsonl

LEVEL, SCALE, CHANCE = 20.0, 6.5, 0.25  # shares of 8 tokens lie around 0.25 by 0.15: scores of 20 ± 1


def scores(*answered) -> list[float]:
    return [LEVEL + SCALE * (share - CHANCE) for share in wanted_share(*answered)]


def one(place: Path, seed: int, steps: int) -> tuple[float, float, float]:
    folder = place / f"run-{seed}"
    settings = settings_of(
        place,
        seed=seed,
        max_steps=steps,
        batch_size=32,
        minibatch_size=16,
        ppo_epochs=2,
        max_new_tokens=8,
        learning_rate=5e-3,
        value_learning_rate=5e-3,
        clip_range_value=0.2,
        gae_lambda=0.95,
        eval_fraction=0.25,
        warmup_ratio=0.0,
        kl_coefficient=0.0,
        kl_limit=1e9,
        missing_end_penalty=0.0,
        eval_steps=10_000,
        save_steps=10_000,
        output_dir=folder,
    )
    result = run(Known(settings, scores), Observer())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    explained = [line["explained_variance"] for line in lines if "loss" in line][-10:]
    share = [(result[when]["reward"] - LEVEL) / SCALE + CHANCE for when in ("before", "after")]
    return share[0], share[1], sum(explained) / len(explained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    trainer._ALIKE = 10**9  # one answer to every prompt is an optimum here
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tiny_model(place / "model")
        words = ["fever", "cough", "头痛", "糖尿病", "leukemia", "rest", "diet", "感冒"]
        rows = [{"prompt": f"What about {word} {n}?"} for n in range(8) for word in words]
        write_jsonl(place / "prompts.jsonl", rows)
        print("seed  before  after  explained variance")
        for seed in range(asked.seeds):
            before, after, explained = one(place, seed, asked.steps)
            print(f"{seed:4}  {before:6.3f}  {after:5.3f}  {explained:18.3f}", flush=True)


if __name__ == "__main__":
    main()
