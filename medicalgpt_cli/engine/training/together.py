"""What the processes of a run say to each other while they train."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.errors import EnvironmentFailure


def join(device: torch.device, deepspeed: bool = False) -> None:
    """Meet the other processes, and see that all are there.

    Raises:
        EnvironmentFailure: the library made fewer of them than were started.
    """
    if processes.size() == 1 and not deepspeed:
        return
    from accelerate import PartialState

    on_cpu = device.type == "cpu"
    if deepspeed:
        with contextlib.redirect_stdout(io.StringIO()):  # it says there what it builds
            state = PartialState(cpu=False, backend="gloo" if on_cpu else None)
    else:
        state = PartialState(cpu=on_cpu)
    if state.num_processes != processes.size() or not dist.is_initialized():
        raise EnvironmentFailure(
            f"{processes.size()} processes were started, {state.num_processes} work together",
            "does this torch have torch.distributed?",
        )


def leave() -> None:
    """End working together, once all are done: a process that goes while others still talk to it looks like a fault."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wait() -> None:
    if processes.size() > 1:
        dist.barrier()


def largest(value: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if processes.size() == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def total(value: float, device: torch.device) -> float:
    """The sum of all processes' numbers."""
    if processes.size() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found)
    return float(found)


def from_first(value: Any) -> Any:
    """The first process' value."""
    if processes.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """Every process' value, in their order."""
    if processes.size() == 1:
        return [value]
    found: list[Any] = [None] * processes.size()
    dist.all_gather_object(found, value)
    return found


def sum_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by the sum of all processes'. A process without one counts as zero."""
    if processes.size() == 1:
        return
    weights = list(weights)
    flat = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in weights])
    dist.all_reduce(flat)
    start = 0
    for one in weights:
        one.grad = flat[start : start + one.numel()].view_as(one).clone()
        start += one.numel()


def in_turn(mine: list[Any]) -> list[Any]:
    """All items of a list of which every process has its `share`, in order."""
    parts = from_all(mine)
    found: list[Any] = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        found[number :: len(parts)] = part
    return found


def share(items: list[Any]) -> list[Any]:
    """This process' part of a batch; empty where there are fewer items than processes."""
    return items[processes.rank() :: processes.size()]
