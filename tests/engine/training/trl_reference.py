"""TRL's SFTTrainer on the examples, order, initial adapter and schedule of a medgpt run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.cli import medgpt


def rates(peak: float, warmup: int, updates: int) -> list[float]:
    """The learning rate of each update: a line up to the peak, then a cosine over the updates that are left."""
    rising = [peak * update / warmup for update in range(1, warmup + 1)]
    left = updates - warmup
    return rising + [peak * (1 + math.cos(math.pi * n / left)) / 2 for n in range(left)]


class Rates(TrainerCallback):
    """Gives each update of a library's trainer its learning rate: the library's own schedule begins at zero."""

    def __init__(self, rates: list[float]):
        self.rates = rates

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        for group in optimizer.param_groups:
            group["lr"] = self.rates[state.global_step]


def our_losses(
    model: Path, data: Path, run: Path, *, steps: int, accumulation: int = 1, more: tuple[str, ...] = ()
) -> list[float]:
    """The loss of each update of `medgpt sft` without dropout, in a real process."""
    done = medgpt(
        *("sft", "--base-model", model, "--train-data", data, "--eval-fraction", "0", "--output-dir", run),
        *("--lora-dropout", "0", "--max-steps", steps, "--gradient-accumulation", accumulation, "--use-cpu"),
        *("--dtype", "fp32", *more),
        timeout=3000,
        env={"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def trl_losses(
    model: Path, data: Path, folder: Path, run: Path, *, steps: int, accumulation: int = 1
) -> list[float]:
    """The losses of `trl_history`."""
    history = trl_history(model, data, folder, run, steps=steps, accumulation=accumulation)
    return [entry["loss"] for entry in history if "loss" in entry]


def rows_of_run(data: Path, run: Path) -> tuple[list[dict], Any, Any, Any]:
    """Token ids and labels of a run in the order of its updates; its settings, tokenizer and schedule."""
    from medicalgpt_cli.engine.data.counts import Counts
    from medicalgpt_cli.engine.data.examples import render_conversation
    from medicalgpt_cli.engine.data.formats import load_conversations
    from medicalgpt_cli.engine.model.loading import load_tokenizer
    from medicalgpt_cli.engine.model.references import resolve_models
    from medicalgpt_cli.engine.observer import Observer
    from medicalgpt_cli.engine.run.manifest import read, resumed_settings
    from medicalgpt_cli.engine.training.batches import EpochSampler
    from medicalgpt_cli.engine.training.trainer_args import schedule
    from medicalgpt_cli.settings.stages import SftSettings

    settings = resumed_settings(read(run), SftSettings(resume=run), run)
    tokenizer = load_tokenizer(settings, resolve_models(settings))
    counts = Counts()
    examples = [
        example
        for conversation in load_conversations([str(data)], counts, Observer())
        for example in render_conversation(tokenizer, conversation, settings.max_length, counts)
    ]
    rows: list[dict] = []
    plan = schedule(settings, len(examples))
    for epoch in range(-(-plan.updates // plan.updates_per_epoch)):
        order = EpochSampler(
            [len(one.input_ids) for one in examples],
            settings.batch_size,
            settings.seed,
            settings.batch_order == "by-length",
        )
        order.set_epoch(epoch)
        rows += [{"input_ids": examples[i].input_ids, "labels": examples[i].labels} for i in order]
    return rows, settings, tokenizer, plan


def trl_history(
    model: Path,
    data: Path,
    folder: Path,
    run: Path,
    *,
    steps: int,
    accumulation: int = 1,
    loading: dict | None = None,
    callbacks: tuple = (),
    **options,
) -> list[dict]:
    """The same from TRL: its collator, its loss, its loop; our token ids in our order, our initial adapter.

    Args:
        loading: what `from_pretrained` is told beside the number format, which is fp32 otherwise.
        options: of SFTConfig, in the place of what is set here.
    """
    import datasets
    import torch
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from medicalgpt_cli.engine.model.adapters import add_adapter
    from medicalgpt_cli.engine.training.trainer_args import learning_rate

    rows, settings, tokenizer, plan = rows_of_run(data, run)
    net = AutoModelForCausalLM.from_pretrained(model, **{"dtype": torch.float32, **(loading or {})})
    if settings.tuning == "lora":
        net = add_adapter(net, settings, seed=settings.seed)
    fixed = {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "learning_rate": learning_rate(settings, settings),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "packing": False,
        "loss_type": "nll",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    trainer = SFTTrainer(
        model=net,
        args=SFTConfig(**{**fixed, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[*callbacks, Rates(rates(learning_rate(settings, settings), plan.warmup, plan.updates))],
    )
    trainer.train()
    return trainer.state.log_history
