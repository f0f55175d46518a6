"""What a stage says about its memory when it starts, and where it stops."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.planning.device import device_memory
from medicalgpt_cli.engine.planning.memory import quantised_bytes
from medicalgpt_cli.engine.planning.needs import Case, largest_batch, needs
from medicalgpt_cli.engine.planning.plan import case_of, operations
from medicalgpt_cli.engine.planning.skeleton import UNKNOWN
from medicalgpt_cli.errors import EnvironmentFailure


def before_loading(stage: Any, observer: Observer) -> dict[str, Any] | None:
    """The one line of a stage that is about to load its model; None where nothing is known.

    Raises:
        EnvironmentFailure: the device has less memory than the stage needs, and --force was not given.
    """
    try:
        case, amount = case_of(stage)
        have = device_memory(stage.settings, case.on_gpu)
        case = stage.fitted(case, have)
        need = needs(case)["peak"]
        flops = operations(case, amount, stage.settings)
    except UNKNOWN:  # a plan that cannot be made is no reason not to run
        observer.on_notice("no plan: what this model needs is not known from its shapes")
        stage.fitted(None, None)
        return None
    tokens = amount.tokens
    observer.on_notice(
        f"plan: {_gib(need)} of {_gib(have)} at most, {stage.schedule.updates:,} updates, {tokens:,} tokens"
        if have is not None
        else f"plan: {_gib(need)} at most, {stage.schedule.updates:,} updates"
    )
    if have is not None and need > have and not stage.settings.force:
        raise EnvironmentFailure(
            f"the run needs {_gib(need)} of memory, and {_gib(have)} are there",
            f"{what_fits(case, have)}; --force goes on",
        )
    return {"peak": need, "flops": flops, "tokens": tokens, "updates": stage.schedule.updates}


def what_fits(case: Case, have: int) -> str:
    """What to do about a run that does not fit into `have` bytes."""
    flag = "--micro-batch-size" if case.roles is not None else "--batch-size"
    states = case.states
    if case.program + states.frozen + states.weights + states.moments > have:
        if case.outline.full:
            return (
                "weights and AdamW's moments alone do not fit: train a LoRA adapter, or take a smaller model"
            )
        in_four_bits = (
            states.frozen * quantised_bytes("4bit", 1024, 1024) / 2**20 / case.outline.dtype.itemsize
        )
        if case.outline.quantization is None and case.program + in_four_bits < have:
            return "the weights alone do not fit: --load-in-4bit, or a smaller model"
        return "the weights alone do not fit, even in 4 bits: take a smaller model"
    batch = largest_batch(case, have)
    if batch is not None:
        return f"{flag} {batch} fits"
    if not case.checkpointing:
        return "not even one example fits: --gradient-checkpointing, or a shorter --max-length"
    return "not even one example fits: a shorter --max-length"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
