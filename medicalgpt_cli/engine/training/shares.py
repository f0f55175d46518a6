"""What learns in a model that processes share, in whole tensors: for a checkpoint, a resume, and the result.

Under their own names and in fp32, so that a checkpoint fits any number of processes and holds nothing pickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from medicalgpt_cli.engine.model.spread import written_to
from medicalgpt_cli.engine.run import processes

_NAME = "learning-{}.safetensors"
_FILE = 2**29  # bytes from which on a file is full
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch and DeepSpeed name them


def make_whole(model: Any, optimizer: Any) -> None:
    """Replace the shares of what learns by whole tensors in fp32, in the first process; all have to call together.

    The model can be saved after that, and nothing else.
    """
    found = {}
    for _, weight in _learning(model):
        value = _get(weight, None, optimizer)
        if processes.rank() == 0:
            found[id(weight)] = torch.nn.Parameter(value)
    for module in model.modules():  # a weight that two layers share stands in both
        for name, weight in list(module._parameters.items()):
            if id(weight) in found:
                module._parameters[name] = found[id(weight)]


def save_learning(model: Any, optimizer: Any, folder: Path) -> None:
    """Write all that learning has changed, whole and in fp32: weights, AdamW's moments, and its count of steps.

    All processes have to call together; the first one writes, file by file, and holds one of them at a time. A name
    is `<part>/<name of the weight>`, and `step` is a scalar.
    """
    files, held = 0, {}
    for name, tensor in _learning_state(model, optimizer):
        if processes.rank() > 0:
            continue  # each has given its part of the tensor
        held[name] = tensor.contiguous()
        if sum(one.nbytes for one in held.values()) > _FILE:
            save_file(held, folder / _NAME.format(files))
            files, held = files + 1, {}
    if held:
        save_file(held, folder / _NAME.format(files))


def _learning_state(model: Any, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    _link_moments(optimizer)
    steps = [int(state["step"]) for state in inner_optimizer(optimizer).state.values() if "step" in state]
    yield "step", torch.tensor(max(steps, default=0))
    for name, weight in _learning(model):
        yield f"weight/{name}", _get(weight, None, optimizer)
        if steps:
            for part in _MOMENTS:
                yield f"{part}/{name}", _get(weight, part, optimizer)


def restore_learning(model: Any, optimizer: Any, folder: Path, *, moments: bool = True) -> None:
    """Put back what `save_learning` wrote, or the weights alone; all processes together.

    Raises:
        KeyError: a weight of the model is not there.
    """
    with ExitStack() as open_files:
        saved = {}
        for path in sorted(folder.glob(_NAME.format("*"))):
            file = open_files.enter_context(safe_open(path, "pt"))
            saved |= dict.fromkeys(file.keys(), file)

        def read(name: str) -> torch.Tensor:
            return saved[name].get_tensor(name)

        if moments:
            _make_moments(optimizer, int(read("step")))
        for name, weight in _learning(model):
            set_weight(weight, read(f"weight/{name}"), optimizer)
            if moments and f"{_MOMENTS[0]}/{name}" in saved:
                for part in _MOMENTS:
                    _set(weight, part, read(f"{part}/{name}"), optimizer)


def _learning(model: Any) -> list[tuple[str, Any]]:
    """The weights that learn, by name, in shares: FSDP leaves some whole after a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def inner_optimizer(optimizer: Any) -> Any:
    """torch's optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _make_moments(optimizer: Any, steps: int) -> None:
    """Moments of zero for each share, which AdamW would make in its first step."""
    inner = inner_optimizer(optimizer)
    as_number = not isinstance(inner, torch.optim.AdamW)  # DeepSpeed's own, for moments on the host
    for share in of_this_process(optimizer):
        inner.state[share] = {
            "step": steps if as_number else torch.tensor(float(steps)),
            **{part: torch.zeros_like(share) for part in _MOMENTS},
        }
    _link_moments(optimizer)


def of_this_process(optimizer: Any) -> list[torch.Tensor]:
    """What AdamW moves in this process."""
    zero = optimizer.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # ZeRO-3, ZeRO-2
        if hasattr(zero, name):
            return list(getattr(zero, name))
    return [weight for group in inner_optimizer(optimizer).param_groups for weight in group["params"]]


def _link_moments(optimizer: Any) -> None:
    """Let ZeRO-2 find each weight's moments: by itself it looks once, when only the first group has any."""
    zero = optimizer.optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state") and inner_optimizer(optimizer).state:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _get(weight: Any, part: str | None, optimizer: Any) -> torch.Tensor:
    if isinstance(weight, DTensor):
        tensor = weight if part is None else inner_optimizer(optimizer).state[weight][part]
        return tensor.detach().full_tensor().float().cpu()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = safe_get_full_fp32_param(weight) if part is None else safe_get_full_optimizer_state(weight, part)
    return found.detach().float().cpu()


def get_weight(weight: Any, optimizer: Any) -> torch.Tensor:
    """A weight that processes share, whole, in fp32 and on the processor; all have to call together."""
    return _get(weight, None, optimizer)


@torch.no_grad()
def set_weight(weight: Any, value: torch.Tensor, optimizer: Any) -> None:
    """Give a weight that processes share new numbers; all have to call together with the same ones."""
    if isinstance(weight, DTensor):
        _copy_share(weight, value)
        return
    with written_to(weight):
        weight.data.copy_(value)
    _set(weight, None, value, optimizer)  # DeepSpeed's own copy in fp32, which AdamW moves


@torch.no_grad()
def _set(weight: Any, part: str | None, value: torch.Tensor, optimizer: Any) -> None:
    if isinstance(weight, DTensor):
        _copy_share(inner_optimizer(optimizer).state[weight][part], value)
        return
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(weight, "ds_id"):
        # The last share is padded, which DeepSpeed's own way of setting a whole weight forgets.
        size = weight.ds_tensor.ds_numel
        padded = torch.zeros(size * processes.size(), dtype=torch.float32)
        padded[: value.numel()] = value.flatten()
        share = padded[size * processes.rank() : size * (processes.rank() + 1)].to(weight.ds_tensor.device)
        if part is None:
            safe_set_local_fp32_param(weight, share)
        else:
            safe_set_local_optimizer_state(weight, share, part)
    elif part is None:
        safe_set_full_fp32_param(weight, value.to(weight.device))
    else:
        safe_set_full_optimizer_state(weight, value.to(weight.device), part)


def _copy_share(target: DTensor, value: torch.Tensor) -> None:
    value = value.to(device=target.device, dtype=target.dtype)
    target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
