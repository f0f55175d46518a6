"""`medgpt rl` beside the PPO of trl 1.12, the last release that had one.

    python tests/benchmarks/ppo_beside_trl.py curves --trl-python PYTHON [--seeds 3] [--steps 40]
    python tests/benchmarks/ppo_beside_trl.py cost MODEL --trl-python PYTHON [--steps 3]

PYTHON is the interpreter of a throw-away environment: `pip install 'trl==1.12.*' peft 'torch>=2.10,<2.14'`.

curves: reward and KL of each step on a tiny model. Both get the same weights, prompts (of one length, so that TRL
pads none), settings and reward model, whose weights are made by hand: it scores the share of an answer's tokens that
are wanted. Each draws its own answers, so curves agree in their course, not by step.

cost: seconds a step (median, without the first), processor seconds of the whole process and peak resident memory on
MODEL, one process after the other. Run it alone, on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

from tests.benchmarks.rl_memory import MEDGPT, cost, peak, write

COMMON = {
    "temperature": 1.0,
    "clip_range": 0.2,
    "clip_range_value": 0.2,
    "value_coefficient": 0.1,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "kl_coefficient": 0.02,
}
TINY = {
    **COMMON,
    "batch_size": 32,
    "minibatch_size": 16,
    "ppo_epochs": 4,
    "learning_rate": 1e-2,
    "max_new_tokens": 8,
    "lora_rank": 8,
    "lora_alpha": 16,
}
REAL = {
    **COMMON,
    "batch_size": 8,
    "minibatch_size": 4,
    "ppo_epochs": 2,
    "learning_rate": 5e-5,
    "max_new_tokens": 32,
    "lora_rank": 8,
    "lora_alpha": 16,
}
REFERENCE = Path(__file__).with_name("trl_ppo_reference.py")
WINDOWS = 6
WORDS = ["fever", "cough", "diet", "rest", "leukemia", "diabetes", "medicine", "doctor"]
Lines = list[dict[str, float]]


def settings_of(shape: dict, place: Path, model: Path, seed: int, steps: int):
    """Our settings where TRL has the same ones, and what it lacks switched off."""
    from medicalgpt_cli.settings.stages import RlSettings

    return RlSettings(
        base_model=str(model),
        train_data=(str(place / "prompts.jsonl"),),
        reward_rule=("length",),  # the reward of the benchmark takes its place
        use_cpu=True,
        dtype="fp32",
        seed=seed,
        max_steps=steps,
        value_learning_rate=shape["learning_rate"],
        schedule="constant",
        warmup_ratio=0.0,
        max_grad_norm=1e9,
        normalise_scores=False,
        score_clip=None,
        missing_end_penalty=0.0,
        eval_fraction=0.0,
        save_steps=10_000,
        output_dir=place / f"ours-{seed}",
        **shape,
    )


def trl_command(
    python: Path, place: Path, shape: dict, model: Path, reward: Path, prompts: list[list[int]],
    *, seed: int, steps: int,
) -> tuple[list[object], Path]:  # fmt: skip
    """The command that runs TRL's trainer on this job, and the file that gets a line a step."""
    name = f"trl-{seed}"
    job = {
        **shape,
        "model": str(model),
        "reward_model": str(reward),
        "prompts": prompts,
        "seed": seed,
        "steps": steps,
        "forward_batch_size": 16,
        "output_dir": str(place / name),
        "lines": str(place / f"{name}.jsonl"),
    }
    (place / f"{name}.json").write_text(json.dumps(job))
    return [python, REFERENCE, place / f"{name}.json"], place / f"{name}.jsonl"


def read(path: Path, steps: int) -> Lines:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if "reward" in line and "kl" in line]
    assert len(lines) == steps, f"{len(lines)} steps instead of {steps}"
    return lines


# -- curves ------------------------------------------------------------------------------------------------


def our_curve(settings, reward: Path) -> Lines:
    """A run of ours whose reward is the same model's score of the same token ids."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from medicalgpt_cli.engine.observer import Observer
    from medicalgpt_cli.engine.training.loop import run
    from tests.engine.training.ppo.test_learning import Known

    scorer = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32).eval()

    @torch.no_grad()
    def score(prompts, texts, answers) -> list[float]:
        found = []
        for prompt, said in zip(prompts, answers, strict=True):
            hidden = scorer.model(input_ids=torch.tensor([[*ids_of[prompt.hash], *said]])).last_hidden_state
            found.append(float(scorer.score(hidden[0, -1])))
        return found

    stage = Known(settings, score)
    ids_of = {one.prompt.hash: one.ids for one in stage.data.training}
    run(stage, Observer())
    return read(settings.output_dir / "metrics.jsonl", settings.max_steps)


def tiny_prompts(place: Path, model: Path) -> list[list[int]]:
    """64 prompts of one length in tokens, written to prompts.jsonl; gives their ids."""
    from transformers import AutoTokenizer

    from medicalgpt_cli.engine.data.rendering import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(model)
    found: dict[str, list[int]] = {}
    for first in WORDS:
        for second in WORDS:
            for mark in ("?", ".", "!"):
                text = f"{first} and {second}{mark}"
                found[text] = encode_prompt(tokenizer, [{"role": "user", "content": text}])
    lengths = [len(ids) for ids in found.values()]
    usual = max(set(lengths), key=lengths.count)
    chosen = {text: ids for text, ids in found.items() if len(ids) == usual}
    chosen = dict(list(chosen.items())[:64])
    write(place / "prompts.jsonl", [{"prompt": text} for text in chosen])
    return list(chosen.values())


def curves(given: argparse.Namespace, place: Path) -> None:
    from transformers import AutoConfig

    from tests.benchmarks.counting_task import counting_reward_model
    from tests.tiny import tiny_model

    model = tiny_model(place / "model")
    prompts = tiny_prompts(place, model)
    used = {token for ids in prompts for token in ids}
    wanted = [
        token for token in range(0, AutoConfig.from_pretrained(model).vocab_size, 4) if token not in used
    ]
    reward = counting_reward_model(place / "reward", model, wanted, len(prompts[0]), TINY["max_new_tokens"])
    ours, theirs = [], []
    for seed in range(given.seeds):
        ours.append(our_curve(settings_of(TINY, place, model, seed, given.steps), reward))
        command, lines = trl_command(
            given.trl_python, place, TINY, model, reward, prompts, seed=seed, steps=given.steps
        )
        peak(command, place / "log")
        theirs.append(read(lines, given.steps))
        print(
            f"seed {seed}: last step {ours[-1][-1]['reward']:.3f}, TRL {theirs[-1][-1]['reward']:.3f}",
            flush=True,
        )
    print(
        f"\n{len(prompts)} prompts of {len(prompts[0])} tokens; mean (lowest – highest) of {given.seeds} seeds"
    )
    show("reward", ours, theirs)
    show("kl", ours, theirs)


def show(name: str, ours: list[Lines], theirs: list[Lines]) -> None:
    """A table of window means, one row a window, and how many windows have bands that meet."""
    steps, met = len(ours[0]), 0
    print(f"\n{name:<10} {'medgpt':>24} {'TRL 1.12':>24}")
    for window in range(WINDOWS):
        begin, end = window * steps // WINDOWS, (window + 1) * steps // WINDOWS
        bands = [
            [statistics.fmean(line[name] for line in run[begin:end]) for run in runs]
            for runs in (ours, theirs)
        ]
        met += min(bands[0]) <= max(bands[1]) and min(bands[1]) <= max(bands[0])
        cells = [f"{statistics.fmean(band):.3f} ({min(band):.3f} – {max(band):.3f})" for band in bands]
        print(f"{f'{begin + 1}–{end}':<10} {cells[0]:>24} {cells[1]:>24}")
    print(f"bands that meet: {met} of {WINDOWS}")


# -- cost --------------------------------------------------------------------------------------------------


def costs(given: argparse.Namespace, place: Path) -> None:
    from transformers import AutoTokenizer

    from medicalgpt_cli.engine.data.rendering import encode_prompt

    texts = [
        f"Case {number}: " + "fever " * 24 + "what now?" for number in range(10, 10 + 4 * REAL["batch_size"])
    ]
    write(place / "prompts.jsonl", [{"prompt": text} for text in texts])
    write(place / "pairs.jsonl", [{"prompt": text, "chosen": "rest", "rejected": "no"} for text in texts])
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    train = ("--base-model", given.model, "--eval-fraction", "0", "--use-cpu", "--dtype", "fp32")
    made = ("--train-data", place / "pairs.jsonl", "--batch-size", "2", "--max-steps", "1")
    figures = []
    peak([*MEDGPT, "reward", *train, *made, "--output-dir", place / "reward"], place / "log")
    flags = [item for name, value in REAL.items() for item in (f"--{name.replace('_', '-')}", value)]
    command = [
        *MEDGPT, "rl", *train, *flags, "--reward-model", place / "reward",
        "--train-data", place / "prompts.jsonl", "--max-steps", given.steps, "--save-steps", "10000",
        "--output-dir", place / "rl",
    ]  # fmt: skip
    measured = cost(command, place / "log")
    figures.append(("medgpt rl", *measured, read(place / "rl" / "metrics.jsonl", given.steps)))

    command, lines = trl_command(
        given.trl_python, place, REAL, given.model, given.model, prompts, seed=0, steps=given.steps
    )
    measured = cost(command, place / "log")
    figures.append(("TRL 1.12 PPO", *measured, read(lines, given.steps)))
    print(
        f"\n{REAL['batch_size']} prompts of {len(prompts[0])} tokens, {REAL['max_new_tokens']} tokens an answer"
    )
    print(f"{'':<26} {'s a step':>10} {'cpu s':>10} {'peak MiB':>10}")
    for label, mib, processor, lines in figures:
        times = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(lines)]
        print(f"{label:<26} {statistics.median(times):>10.2f} {processor:>10.1f} {mib:>10,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--trl-python", type=Path, required=True, help="interpreter of an environment with trl 1.12"
    )
    what = parser.add_subparsers(required=True)
    one = what.add_parser("curves", parents=[shared])
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--steps", type=int, default=40)
    one.set_defaults(run=curves)
    other = what.add_parser("cost", parents=[shared])
    other.add_argument("model", type=Path)
    other.add_argument("--steps", type=int, default=3)
    other.set_defaults(run=costs)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        given.run(given, Path(name))


if __name__ == "__main__":
    main()
