"""The only place where our settings become a library's configuration."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from medicalgpt_cli.engine.model.loading import choose_device
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.engine.training import sharding
from medicalgpt_cli.errors import EnvironmentFailure, UsageError
from medicalgpt_cli.settings.groups import AdapterSettings, OptimSettings
from medicalgpt_cli.settings.stages import PretrainSettings, RlSettings, TrainSettings

# Our name to the library's.
_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}
DEFAULT_LEARNING_RATE = {"lora": 2e-4, "full": 2e-5, "new": 1e-3, "rl": 5e-5}


@dataclass(frozen=True)
class Schedule:
    """The length of a run in updates."""

    updates_per_epoch: int
    updates: int
    warmup: int
    eval_every: int
    save_every: int


def learning_rate(optim: OptimSettings, adapter: AdapterSettings) -> float:
    kind = adapter.tuning
    if isinstance(adapter, RlSettings):
        kind = "rl"
    elif isinstance(adapter, PretrainSettings) and adapter.from_config is not None:
        kind = "new"
    return optim.learning_rate or DEFAULT_LEARNING_RATE[kind]


def check_surroundings(settings: TrainSettings) -> None:
    """See that devices and trackers are there, before anything is read.

    Raises:
        EnvironmentFailure: one of them is not. UsageError: the device cannot do what was asked for.
    """
    device = choose_device(settings)
    if settings.optimizer.startswith("paged") and device.type == "cpu":
        raise UsageError(
            f"--optimizer {settings.optimizer} needs a GPU, whose memory it pages out of",
            "take --optimizer adamw-8bit, or leave it out",
        )
    for tracker in settings.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise EnvironmentFailure(
                f"--report-to {tracker}: {tracker} is not installed",
                f"pip install {tracker}, or leave it out",
            )


def check_processes(settings: TrainSettings) -> None:
    """See that as many processes are here as were asked for.

    Raises:
        UsageError: they are not.
    """
    wanted, here = settings.wanted_processes, processes.size()
    if not settings.dry_run and wanted != here and not (wanted == 1 and here > 1):  # torchrun says how many
        raise UsageError(
            f"{wanted} processes were asked for, and {here} started",
            "give --processes to the command itself: inside a pipeline and under torchrun it has no effect",
        )


def same_global_batch(settings: TrainSettings, before: int) -> TrainSettings:
    """The settings of a resumed run that had `before` processes, with as many examples an update as then.

    Raises:
        UsageError: they cannot be divided among the processes that there are now.
    """
    examples, now = settings.batch_size * before, processes.size()
    if examples % now:
        raise UsageError(
            f"the run has {examples} examples a step, which {now} processes cannot divide evenly",
            f"go on with {before} processes, or with one",
        )
    return replace(settings, batch_size=examples // now)


def schedule(optim: OptimSettings, examples: int, count: int = 1) -> Schedule:
    """How many updates a run over `examples` examples makes in `count` processes, as the trainer counts them.

    Raises:
        UsageError: the warm-up is longer than the run, whose learning rate would never reach its peak.
    """
    batches = math.ceil(examples / (optim.batch_size * count))
    per_epoch = max(math.ceil(batches / optim.gradient_accumulation), 1)
    updates = optim.max_steps or max(math.ceil(optim.epochs * per_epoch), 1)
    tenth = max(math.ceil(updates / 10), 1)
    warmup = math.ceil(updates * optim.warmup_ratio) if optim.warmup_steps is None else optim.warmup_steps
    if warmup > updates:
        raise UsageError(
            f"--warmup-steps {warmup} is longer than the run of {updates} updates",
            "give fewer, or train for longer",
        )
    return Schedule(
        updates_per_epoch=per_epoch,
        updates=updates,
        warmup=warmup,
        eval_every=optim.eval_steps or max(tenth, 20),
        save_every=optim.save_steps or max(tenth, 10),
    )


def warmed_up(factor: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """A schedule of the library, with a warm-up that learns from its first update on.

    The library's begins at zero, so that the first update changes nothing (in rl, a whole rollout is drawn for it).
    Here update k of `warmup` has k / warmup of the peak; the updates after it have what the library gives them.

    Args:
        factor: the share of the peak that update number n has, counted from 0.
    """
    return lambda step: (step + 1) / warmup if step < warmup else factor(step)


def _course(settings: TrainSettings) -> dict[str, Any]:
    """The library's name of a schedule. In rl, whose rewards go on changing with the policy, cosine ends at a tenth."""
    if settings.schedule == "cosine" and isinstance(settings, RlSettings):
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    return {
        "lr_scheduler_type": settings.schedule if settings.schedule != "constant" else "constant_with_warmup"
    }


def training_arguments(
    settings: TrainSettings,
    plan: Schedule,
    *,
    folder: Path,
    torch_device: torch.device,
    dtype: torch.dtype,
    evaluate: bool,
) -> TrainingArguments:
    """TrainingArguments for our loop. Everything that a library would switch on by itself is set explicitly."""
    cuda = torch_device.type == "cuda"
    recomputes = settings.gradient_checkpointing and not isinstance(
        settings, RlSettings
    )  # it does so by itself
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=plan.updates,
        learning_rate=learning_rate(settings, settings),
        **_course(settings),
        warmup_steps=plan.warmup,
        weight_decay=settings.weight_decay,
        # rl clips policy and value function apart, in its trainer.
        max_grad_norm=0.0 if isinstance(settings, RlSettings) else settings.max_grad_norm,
        neftune_noise_alpha=settings.neftune_alpha,
        optim=_OPTIMIZERS[settings.optimizer],
        bf16=cuda and dtype == torch.bfloat16,
        fp16=cuda and dtype == torch.float16,
        gradient_checkpointing=recomputes,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recomputes else None,
        # DeepSpeed finds the processor by itself; told to use it, accelerate would leave DeepSpeed out
        use_cpu=torch_device.type == "cpu" and not sharding.uses_deepspeed(settings),
        **sharding.library_options(settings),
        seed=settings.seed,
        data_seed=settings.seed,
        logging_strategy="steps",
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=plan.eval_every if evaluate else None,
        save_strategy="steps",
        save_steps=plan.save_every,
        save_total_limit=None,  # our own guard prunes, after the new checkpoint is complete
        disable_tqdm=True,
        report_to=list(settings.report_to) or "none",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        push_to_hub=False,
    )
