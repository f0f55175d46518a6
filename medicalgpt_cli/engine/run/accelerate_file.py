"""A file of `accelerate config` as the launch of a run: how many processes there are, where, and what they share."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.run.processes import Launch, free_port
from medicalgpt_cli.errors import EnvironmentFailure, UsageError

_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "FSDP")


def read_launch(path: Path) -> Launch:
    """What accelerate's own launcher would make of the file, for ours.

    Raises:
        UsageError: it is no such file, or asks for what a flag of medgpt's decides.
        EnvironmentFailure: DeepSpeed is not installed.
    """
    if not path.is_file():
        raise UsageError(f"--accelerate-config {path}: no such file", "`accelerate config` writes one")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    try:
        given = launch_command_parser().parse_args(["--config_file", str(path), "-m", "medicalgpt_cli"])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            given, file, _ = _validate_launch_command(given)
        kind = str(file.distributed_type).rpartition(".")[2]
        _check(path, given, kind)
        environment = _environment(given, file, kind)
    except ImportError:
        raise EnvironmentFailure(
            f"{path}: DeepSpeed is not installed", "pip install 'medicalgpt-cli[deepspeed]'"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        if isinstance(problem, UsageError):
            raise
        raise UsageError(
            f"{path}: accelerate does not take it ({problem})", "`accelerate config` writes such a file"
        ) from None
    return _launch(path, given, environment)


def _check(path: Path, given: Any, kind: str) -> None:
    elsewhere = {
        "dynamo_backend": ("no", "--compile compiles the model"),
        "fp8_config": (None, "--fp8 computes in 8 bits"),
    }
    if kind not in _KINDS:
        raise UsageError(f"{path}: distributed_type {kind} is not supported", f"one of {', '.join(_KINDS)}")
    if kind == "FSDP" and int(given.fsdp_version) != 2:
        raise UsageError(f"{path}: FSDP 1 is not supported", "fsdp_version: 2")
    if given.use_parallelism_config:
        raise UsageError(f"{path}: parallelism_config is not supported", "take it out of the file")
    for name, (nothing, hint) in elsewhere.items():
        value = getattr(given, name, None)
        if value and str(value).lower() != nothing:
            raise UsageError(f"{path}: {name} has no effect here", hint)


def _environment(given: Any, file: Any, kind: str) -> dict[str, str]:
    """The variables by which accelerate's launcher speaks to the processes that it starts."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    given.main_process_port = given.main_process_port or free_port()
    if kind == "DEEPSPEED":
        given.deepspeed_fields_from_accelerate_config = ",".join(file.deepspeed_config)
        given.deepspeed_multinode_launcher = "standard"
        with contextlib.redirect_stdout(io.StringIO()):
            _, found = prepare_deepspeed_cmd_env(given)
    elif kind == "FSDP" or kind == "MULTI_GPU":
        found = prepare_multi_gpu_env(given)
    else:
        found = {"CUDA_VISIBLE_DEVICES": ""} if given.use_cpu else {}
    kept = ("ACCELERATE_", "FSDP_", "CUDA_VISIBLE_DEVICES")
    return {
        name: value
        for name, value in found.items()
        if name.startswith(kept)
        and os.environ.get(name) != value
        and not name.startswith("ACCELERATE_DYNAMO")
    }


def _launch(path: Path, given: Any, environment: dict[str, str]) -> Launch:
    machines, number = given.num_machines or 1, int(given.machine_rank or 0)
    if given.num_processes % machines or not 0 <= number < machines:
        raise UsageError(
            f"{path}: {given.num_processes} processes on {machines} machines, of which this is number {number}",
            "num_processes counts all machines together; machine_rank begins with 0",
        )
    if machines > 1 and not given.main_process_ip:
        raise UsageError(f"{path}: main_process_ip is missing", "name the first machine's address")
    here = given.num_processes // machines
    return Launch(
        here=here,
        first=number * here,
        total=given.num_processes,
        address=given.main_process_ip or "127.0.0.1",
        port=given.main_process_port,
        environment=environment,
    )
