"""A stage's plan: will it fit, and how long will it take; from its configuration and its data, without weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medicalgpt_cli.engine.model.loading import choose_device
from medicalgpt_cli.engine.model.references import ResolvedModel
from medicalgpt_cli.engine.planning import work
from medicalgpt_cli.engine.planning.batches import Amount, largest_possible, over_the_run
from medicalgpt_cli.engine.planning.device import device_memory, dtype_for, file_bytes, for_gpu, program_bytes
from medicalgpt_cli.engine.planning.needs import Case, Roles, largest_batch, needs
from medicalgpt_cli.engine.planning.rehearsal import Rows, lies_end_to_end
from medicalgpt_cli.engine.planning.skeleton import UNKNOWN, outline
from medicalgpt_cli.engine.run import environment, processes
from medicalgpt_cli.engine.training.sharding import check_combination, kind_of
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.planning import PlanSettings
from medicalgpt_cli.settings.stages import RlSettings, TrainSettings

WAYS = ("ddp", "zero2", "zero3", "fsdp")


def case_of(stage: Any) -> tuple[Case, Amount]:
    """The case of a stage that has read its data, and how much it computes."""
    from medicalgpt_cli.engine.training.trainer_args import schedule

    settings: TrainSettings = stage.settings
    device = choose_device(settings)
    on_gpu = for_gpu(settings, device)
    dtype = dtype_for(settings, device, on_gpu)
    kind = "reward" if stage.name == "reward" else "language"
    plan = outline(stage.resolved, dtype, kind=kind, tuning=settings, quantization=settings.quantization)
    padded = _padded(stage, plan, on_gpu)
    items, count = (
        stage.batch_items(),
        settings.wanted_processes if processes.size() == 1 else processes.size(),
    )
    if processes.size() == 1 and count > 1:  # a plan is made in one process for several
        stage.schedule = schedule(settings, stage.examples, count)
    updates = stage.schedule.updates
    draws = min(updates * settings.batch_size * settings.gradient_accumulation * count, 10**9)
    per_epoch = stage.schedule.updates_per_epoch
    draws = min(draws, -(-updates * len(stage.sampler()) // per_epoch))
    rows, amount = over_the_run(items.__getitem__, stage.sampler(), draws, settings.batch_size, count, padded)
    autocast = dtype if on_gpu and dtype != torch.float32 else None
    roles, batch_size = None, settings.batch_size
    if isinstance(settings, RlSettings):
        roles = _roles(stage, settings, dtype)
        batch_size = min(settings.answers_a_pass, -(-settings.minibatch_size // count))
        rows = largest_possible(items, batch_size, padded)
    case = Case(
        plan,
        rows,
        items,
        stage=stage.name,
        optimizer=settings.optimizer,
        checkpointing=settings.gradient_checkpointing,
        accumulates=settings.gradient_accumulation > 1,
        parallel=kind_of(settings),
        devices=count,
        on_gpu=on_gpu,
        autocast=autocast,
        program=program_bytes(on_gpu),
        file=file_bytes(stage.resolved),
        roles=roles,
        batch_size=batch_size,
    )
    return case, amount


def _padded(stage: Any, plan: Any, on_gpu: bool) -> bool:
    """Whether batches will be padded; the stage itself asks the loaded model (`Stage.keeps_apart`)."""
    settings = stage.settings
    if getattr(settings, "layout", None) == "padded" or settings.neftune_alpha is not None:
        return True
    if on_gpu and plan.quantization == "8bit":  # texts influence one another there (docs/quantization.md)
        return True
    return not lies_end_to_end(plan)


def _roles(stage: Any, settings: RlSettings, dtype: torch.dtype) -> Roles:
    from medicalgpt_cli.engine.training.ppo.roles import shares_base

    reward: ResolvedModel | None = stage.reward_resolved
    shared = reward is not None and shares_base(stage.resolved, reward)
    has_value = settings.algorithm == "ppo"
    prompts = sorted((item.tokens - settings.max_new_tokens for item in stage.batch_items()), reverse=True)
    answers = settings.batch_size * settings.answers_a_prompt
    together = min(settings.rollout_size, answers)
    prompts = [one for one in prompts for _ in range(settings.answers_a_prompt)]
    apart = None
    if reward is not None and not shared:
        apart = outline(reward, dtype, kind="reward", quantization=settings.quantization)
    return Roles(
        has_value=has_value,
        adapters=1 + int(has_value) + int(stage.resolved.adapter is not None) + int(shared),
        apart=apart,
        drawn=Rows(tuple(prompts[:together]), 0, True),
        new_tokens=settings.max_new_tokens,
    )


# -- how much is computed ------------------------------------------------------------------------------------


def operations(case: Case, amount: Amount, settings: TrainSettings) -> float:
    """Floating-point operations of the whole run, held-out measures aside."""
    shape = case.shape
    if not isinstance(settings, RlSettings):
        targets = 0 if case.stage == "reward" else amount.targets
        return work.training(
            shape, amount.tokens, amount.pairs, targets, checkpointing=settings.gradient_checkpointing
        )
    each = settings.answers_a_prompt
    tokens, targets, pairs = (each * one for one in (amount.tokens, amount.targets, amount.pairs))
    body = work.Shape(shape.linear, shape.learnt, shape.adapter, 0, False, shape.attention)
    drawn = work.forward(shape, tokens, pairs, targets)
    back = 2 * work.forward(shape, tokens, pairs, targets)  # policy and reference
    learn = work.training(shape, tokens, pairs, targets, checkpointing=settings.gradient_checkpointing)
    if settings.algorithm == "ppo":
        back += work.forward(body, tokens, pairs, 0)
        learn += work.training(body, tokens, pairs, 0, checkpointing=settings.gradient_checkpointing)
    if settings.reward_model:
        back += work.forward(body, tokens, pairs, 0)
    return drawn + back + settings.ppo_epochs * learn


# -- the plan as plain data ----------------------------------------------------------------------------------


def plan_of(stage: Any) -> dict[str, Any]:
    """All that `medgpt plan` shows and `--json` prints: sizes in bytes, times in seconds."""
    settings: PlanSettings = stage.settings
    case, amount = _checked(stage)
    have = settings.device_bytes or device_memory(settings, case.on_gpu)
    fits = needs(case)
    flops = operations(case, amount, settings)
    tokens = amount.tokens * (settings.answers_a_prompt if isinstance(settings, RlSettings) else 1)
    counts = [case.devices] if case.devices > 1 else [2, 4, 8]
    if settings.devices is not None:
        counts = [settings.devices]
    return {
        "stage": stage.name,
        "model": stage.resolved.label,
        "device": "gpu" if case.on_gpu else "cpu",
        "devices": case.devices,
        "parallel": case.parallel,
        "dtype": str(case.outline.dtype).removeprefix("torch."),
        "quantization": case.outline.quantization,
        "parameters": case.parameters.total,
        "trainable": case.parameters.trainable,
        "memory": {**fits, "cache": case.cache},
        "roles": None if case.roles is None else _roles_said(case),
        "batch": {
            "rows": len(case.rows.lengths),
            "tokens": case.rows.tokens,
            "longest": max(case.rows.lengths),
            "padded": case.rows.padded,
        },
        "several": {
            str(number): {
                way: needs(case, way, number)["peak"] if _can_spread(stage, way, case.on_gpu) else None
                for way in WAYS
            }
            for number in counts
        },
        "device_memory": have,
        "fits": None if have is None else fits["peak"] <= have,
        "largest_batch": None if have is None else largest_batch(case, have),
        "batch_flag": "--micro-batch-size" if case.roles is not None else "--batch-size",
        "examples": len(case.items),
        **stage.plan(),
        "tokens": tokens,
        "flops": flops,
        "time": _time(settings, case, flops, tokens),
        "disk": disk(case, settings),
        "data": stage.data.report,
    }


def _can_spread(stage: Any, way: str, on_gpu: bool) -> bool:
    """Whether the stage would run in this way."""
    try:
        check_combination(replace(stage.settings, parallel=way), stage.name, stage.resolved, on_gpu)
    except UsageError:
        return False
    return True


def _checked(stage: Any) -> tuple[Case, Amount]:
    with explained(stage.resolved):
        case, amount = case_of(stage)
        needs(case)
        _ = case.shape
        return case, amount


@contextlib.contextmanager
def explained(resolved: ResolvedModel) -> Iterator[None]:
    """
    Raises:
        UsageError: something in a model cannot be rehearsed.
    """
    try:
        yield
    except UNKNOWN as problem:
        raise UsageError(
            f"{resolved.label}: its memory is not known from its shapes ({type(problem).__name__})",
            "some rare kinds of models cannot be planned; --debug shows more",
        ) from problem


def _roles_said(case: Case) -> dict[str, Any]:
    assert case.roles is not None
    return {
        "policy": case.parameters.adapter_bytes,
        "value": case.parameters.adapter_bytes if case.roles.has_value else 0,
        "frozen_adapters": case.parameters.adapter_bytes
        * (case.roles.adapters - 1 - int(case.roles.has_value)),
        "reward_model_apart": 0
        if case.roles.apart is None
        else case.frozen_bytes - case.parameters.base_bytes,
        "one_base": case.parameters.base_bytes,
        "drawing": case.answering,
    }


def disk(case: Case, settings: TrainSettings) -> dict[str, int]:
    """Bytes of a checkpoint, of all that are kept and the one being written, and of the result."""
    learning, moments = case.states.weights, case.states.moments
    one = learning + moments
    result = case.parameters.trainable_bytes
    return {
        "checkpoint": one,
        "checkpoints": one * (settings.keep_checkpoints + 1),
        "result": result,
        "total": one * (settings.keep_checkpoints + 1) + result,
        "free": environment.disk_free(Path(settings.output_dir or "runs")),
    }


def _time(settings: PlanSettings, case: Case, flops: float, tokens: int) -> dict[str, Any]:
    """Seconds of training, and where the figure comes from."""
    if settings.throughput is None:
        device = choose_device(settings)
        if case.on_gpu != (device.type == "cuda"):
            return {"seconds": None, "source": "no such device here to measure on"}
        width = case.outline.config.get_text_config().hidden_size
        speed = work.speed_here(width, case.rows.tokens, case.autocast or torch.float32, device)
        return {
            "seconds": flops / speed / case.devices,
            "source": "measured products",
            "flops_a_second": speed,
        }
    if (number := settings.tokens_a_second) is not None:
        return {"seconds": tokens / number, "source": "given"}
    speed = speed_of_run(Path(settings.throughput))
    return {"seconds": flops / speed / case.devices, "source": settings.throughput, "flops_a_second": speed}


def speed_of_run(folder: Path) -> float:
    """Operations a second that an earlier run came to, by its own plan and clock.

    Raises:
        UsageError: the run is not finished, or has no plan.
    """
    from medicalgpt_cli.engine.run.manifest import read

    found = read(folder)
    planned, result = found.get("plan") or {}, found.get("result") or {}
    if not planned.get("flops") or not result.get("seconds"):
        raise UsageError(
            f"--throughput {folder}: the run does not say how fast it was",
            "name a finished run of this version",
        )
    done = result["steps"] / max(planned["updates"], 1)
    return planned["flops"] * done / result["seconds"] / max(found.get("processes") or 1, 1)
