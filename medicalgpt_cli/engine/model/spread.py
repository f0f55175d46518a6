"""Weights of which each process holds a share: DeepSpeed's ZeRO-3 marks them, FSDP2 makes DTensors of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor


def is_spread(model: torch.nn.Module) -> bool:
    """Whether processes share the weights: then a layer can only be called as a part of the model."""
    return any(map(is_shared, model.parameters()))


def is_shared(weight: torch.Tensor) -> bool:
    """Whether this process holds a share of a weight."""
    return _is_partitioned(weight) or isinstance(weight, DTensor)


def size_of(weight: torch.Tensor) -> int:
    """Numbers in the whole of a weight."""
    return getattr(weight, "ds_numel", weight.numel())


@contextmanager
def written_to(weight: torch.nn.Parameter) -> Iterator[None]:
    """Inside, a weight is whole; what the first process makes of it goes to all. All enter together."""
    if not _is_partitioned(weight):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        yield


def _is_partitioned(weight: torch.Tensor) -> bool:
    return hasattr(weight, "ds_id")
