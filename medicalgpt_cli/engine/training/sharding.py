"""Weights, gradients and moments spread over the processes: DeepSpeed's ZeRO and torch's FSDP2, through accelerate.

Here is what is asked for, what is refused, and the proof that the library did it: on the wrong device it silently does
something else. How the shares become whole tensors again is in shares.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from medicalgpt_cli.engine.model.loading import choose_dtype
from medicalgpt_cli.engine.model.references import ResolvedModel
from medicalgpt_cli.engine.model.spread import size_of
from medicalgpt_cli.engine.model.vocabulary import new_token_ids
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.engine.training.shares import of_this_process
from medicalgpt_cli.errors import EnvironmentFailure, UsageError
from medicalgpt_cli.settings.fields import flag_of
from medicalgpt_cli.settings.stages import RlSettings, TrainSettings

_INSTALL = "pip install 'medicalgpt-cli[deepspeed]'"


def kind_of(settings: TrainSettings) -> str:
    """What the processes share: "ddp" (nothing), "zero2", "zero3" or "fsdp", as in `--parallel`.

    With `--accelerate-config` it is what that file's launch has put into the environment.
    """
    if settings.accelerate_config is None:
        return settings.parallel
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return "ddp"
    return "zero3" if _stage_in_environment() == 3 else "zero2"


def _stage_in_environment() -> int:
    """ZeRO's stage in accelerate's environment; stage 1 shards the moments only and is handled like 2."""
    config = _deepspeed_config()
    if config is not None:
        return int(config["zero_optimization"]["stage"])
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def _deepspeed_config() -> dict[str, Any] | None:
    """DeepSpeed's own configuration file, where accelerate's names one."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if file == "none" else json.loads(Path(file).read_text(encoding="utf-8"))


def spreads_weights(settings: TrainSettings) -> bool:
    """Whether no process holds a whole model."""
    return kind_of(settings) in ("zero3", "fsdp")


def uses_deepspeed(settings: TrainSettings) -> bool:
    return kind_of(settings).startswith("zero")


# -- before anything is loaded ---------------------------------------------------------------------------------


def check_combination(settings: TrainSettings, stage: str, resolved: ResolvedModel, on_gpu: bool) -> None:
    """Say what cannot be spread over processes, before any weight is read.

    Args:
        on_gpu: whether they run, or are planned, on GPUs.

    Raises:
        UsageError: a combination that the libraries compute wrongly, silently leave out, or that is unproved.
    """
    kind = kind_of(settings)
    if kind == "ddp":
        return
    flag = _flag_of(settings)
    if kind == "fsdp" and not on_gpu:
        raise UsageError(
            f"{flag}: on a processor accelerate would silently copy the weights instead of sharding them",
            "take --parallel zero3, or GPUs",
        )
    if settings.optimizer != "adamw":
        raise UsageError(
            f"--optimizer {settings.optimizer} with {flag}: sharded moments are AdamW's in 32 bits",
            "leave --optimizer out: each process holds a part of the moments only",
        )
    if kind != "zero2":
        _check_spread_weights(settings, stage, resolved, flag)


def _flag_of(settings: TrainSettings) -> str:
    return f"--parallel {kind_of(settings)}" if settings.accelerate_config is None else "--accelerate-config"


def check_sharding(settings: TrainSettings, device: torch.device) -> None:
    """See that there is what spreading over processes takes, before any weight is read.

    Raises:
        UsageError: there are no processes, or the file of `--accelerate-config` overrules a flag.
        EnvironmentFailure: DeepSpeed is not installed.
    """
    kind, flag = kind_of(settings), _flag_of(settings)
    if kind == "ddp":
        return
    if not processes.started():
        raise UsageError(
            f"{flag}: this run was started without its processes",
            "give it to the command itself: inside a pipeline it has no effect",
        )
    if uses_deepspeed(settings) and importlib.util.find_spec("deepspeed") is None:
        raise EnvironmentFailure(f"{flag}: DeepSpeed is not installed", _INSTALL)
    if settings.accelerate_config is not None:
        _check_environment(settings, device)


def _check_spread_weights(settings: TrainSettings, stage: str, resolved: ResolvedModel, flag: str) -> None:
    if stage == "rl":
        raise UsageError(
            f"{flag} is not for rl: its processes draw answers of different lengths, each with a whole model",
            "take --parallel zero2, or --load-in-4bit",
        )
    if settings.quantization:
        raise UsageError(
            f"--load-in-{settings.quantization} with {flag}: quantised weights are not spread",
            "take --parallel zero2 or ddp, or full-precision weights",
        )
    if settings.dora:
        raise UsageError(f"--dora with {flag}: DoRA needs whole weights", "take --parallel zero2 or ddp")
    if settings.tuning == "full" and resolved.adapter is not None:
        raise UsageError(
            f"{flag}: an adapter cannot be merged into spread weights",
            "merge it first (medgpt merge-lora), then --base-model",
        )
    if getattr(settings, "from_config", None) is not None:
        raise UsageError(f"{flag}: a new model is made as a whole", "take --parallel zero2 or ddp")
    rows = bool(resolved.base.folder and new_token_ids(resolved.base.folder))
    if settings.tuning == "lora" and (
        settings.embeddings == "all" or (rows and settings.embeddings != "frozen")
    ):
        raise UsageError(
            f"{flag}: rows of the embeddings that learn beside an adapter need whole tables",
            f"take {flag_of('embeddings')} frozen, or --parallel zero2",
        )


def _check_environment(settings: TrainSettings, device: torch.device) -> None:
    """See that the file of `--accelerate-config` does not overrule a flag."""
    clipping = ("auto", "none", str(settings.max_grad_norm))
    if isinstance(settings, RlSettings):
        clipping = ("0", "0.0", "auto", "none")  # its trainer clips policy and value function apart
    ours = {
        "MIXED_PRECISION": (
            ("no", {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(choose_dtype(settings, device), "no")),
            "--dtype",
        ),
        "GRADIENT_ACCUMULATION_STEPS": (
            ("auto", str(settings.gradient_accumulation)),
            "--gradient-accumulation",
        ),
        "GRADIENT_CLIPPING": (clipping, "--max-grad-norm"),
    }
    for name, (allowed, flag) in ours.items():
        value = os.environ.get(f"ACCELERATE_{name}", "no" if name == "MIXED_PRECISION" else "auto")
        if value.lower() not in allowed:
            raise UsageError(
                f"{settings.accelerate_config}: {name.lower()} is {value}, and {flag} comes to {allowed[-1]}",
                f"take it out of the file, or give {flag}",
            )
    for name, flags in (("scheduler", "--schedule and --warmup-ratio"), ("optimizer", "--optimizer")):
        if name in (_deepspeed_config() or {}):
            raise UsageError(
                f"{settings.accelerate_config}: its DeepSpeed file has `{name}`, which would overrule {flags}",
                f"take `{name}` out of that file",
            )


def prepare_environment(settings: TrainSettings, device: torch.device) -> None:
    """What the libraries read as they are imported or meet."""
    if uses_deepspeed(settings):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
    elif kind_of(settings) == "fsdp" and settings.accelerate_config is None:
        # Only the first process reads the files; the others get their shares from it.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def library_options(settings: TrainSettings) -> dict[str, Any]:
    """The arguments of the trainer that spread the model; those of `--accelerate-config` stand in the environment."""
    kind = kind_of(settings)
    if kind == "ddp":
        return {}
    options: dict[str, Any] = {"accelerator_config": {"use_configured_state": True}}
    if settings.accelerate_config is not None:
        return options
    if kind == "fsdp":
        return {**options, "fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}}
    # "auto" is worked out by the library from the model's width; DeepSpeed's own buckets are gigabytes.
    zero: dict[str, Any] = {"stage": 3 if kind == "zero3" else 2, "reduce_bucket_size": "auto"}
    if kind == "zero3":
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    return {
        **options,
        "deepspeed": {
            "zero_optimization": zero,
            **dict.fromkeys(
                (
                    "train_batch_size",
                    "train_micro_batch_size_per_gpu",
                    "gradient_accumulation_steps",
                    "gradient_clipping",
                ),
                "auto",  # as the trainer's own arguments say
            ),
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
        },
    }


# -- once it is set up -----------------------------------------------------------------------------------------


def check_spread(settings: TrainSettings, model: Any, wrapped: Any, optimizer: Any) -> None:
    """See that the library has done what was asked for.

    Args:
        wrapped: the model as the trainer calls it.

    Raises:
        EnvironmentFailure: it has not.
    """
    kind = kind_of(settings)
    if kind == "ddp":
        return
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    if kind == "fsdp":
        right = all(isinstance(weight, DTensor) for weight in model.parameters())
        mine = sum(weight.to_local().numel() for weight in learning if isinstance(weight, DTensor))
    else:
        stage = getattr(wrapped, "zero_optimization_stage", lambda: None)()
        right = stage == 3 if kind == "zero3" else stage in (1, 2)
        if kind == "zero3":
            right = right and all(hasattr(weight, "ds_id") for weight in model.parameters())
        mine = sum(share.numel() for share in of_this_process(optimizer)) if right else 0
    whole = sum(size_of(weight) for weight in learning)
    # Shares are padded a little; moments of a whole model in each of several processes are what must not be.
    if not right or (processes.size() > 1 and mine > 0.75 * whole + 4096):
        raise EnvironmentFailure(
            f"the library did not set up {kind}: this process holds {mine:,} of {whole:,} learning weights",
            "this is a fault of medgpt or of a library's version; --parallel ddp works without it",
        )
