"""Memory of a stage by part, at its largest batch, on one device and on several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from medicalgpt_cli.engine.planning import memory
from medicalgpt_cli.engine.planning.batches import Item, largest_possible
from medicalgpt_cli.engine.planning.memory import States
from medicalgpt_cli.engine.planning.rehearsal import Cached, Manner, Rehearsed, Rows, cached, rehearse
from medicalgpt_cli.engine.planning.skeleton import Outline, Parameters, build, count, depth
from medicalgpt_cli.engine.planning.work import Shape, shape_of

# Of what comes and goes with each batch: the holes in glibc's heap and the products' scratch space on a processor, the
# rounding of torch's caching allocator on a GPU. The fitted numbers of the plan (docs/planning.md).
SLACK_ON_CPU, SLACK_ON_GPU = 0.10, 0.06
# Freed memory that glibc keeps for the next tensors; up to 1 GiB (`run/allocation.py`).
HEAP_KEPT = 200 * 2**20


@dataclass(frozen=True)
class Roles:
    """What reinforcement learning holds beside the policy and does beside learning."""

    has_value: bool
    adapters: int  # policy, value, reference and reward, as far as they are adapters over the policy's base
    apart: Outline | None  # a reward model with weights of its own
    drawn: Rows  # the prompts that are answered at one time
    new_tokens: int


@dataclass(frozen=True)
class Planned:
    """A model that a plan is about."""

    outline: Outline

    @cached_property
    def skeleton(self) -> Any:
        return build(self.outline)

    @cached_property
    def parameters(self) -> Parameters:
        return count(self.skeleton)


@dataclass(frozen=True)
class Case(Planned):
    """All that a stage's memory follows from."""

    rows: Rows  # the largest batch of a process
    items: Sequence[Item] = field(repr=False)
    stage: str = "sft"
    optimizer: str = "adamw"
    checkpointing: bool = False
    accumulates: bool = False
    spread: bool = False
    in_shares: bool = False
    parallel: str = "ddp"
    devices: int = 1
    on_gpu: bool = False
    autocast: torch.dtype | None = None
    program: int = 0  # bytes that the process holds before it loads anything
    file: int = 0  # bytes of the weight files, which are mapped while they are read
    roles: Roles | None = None
    batch_size: int = 1

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.skeleton)

    @cached_property
    def frozen_bytes(self) -> int:
        """Weights that do not learn, the other roles' included."""
        found = self.parameters.base_bytes + self.parameters.adapter_bytes - self.parameters.trainable_bytes
        if self.roles is not None:
            found += self.parameters.adapter_bytes * (self.roles.adapters - 1 - int(self.roles.has_value))
            if self.roles.apart is not None:
                apart = count(build(self.roles.apart))
                found += apart.base_bytes + apart.adapter_bytes
        return found

    @cached_property
    def states(self) -> States:
        """What one device would hold from step to step if it were alone."""
        sets = 2 if self.roles is not None and self.roles.has_value else 1  # the value function learns, too
        learnt = sets * self.parameters.trainable
        weights = sets * self.parameters.trainable_bytes
        return States(self.frozen_bytes, weights, 4 * learnt, memory.moments_bytes(learnt, self.optimizer))

    def held(self, way: str) -> States:
        """The same as DeepSpeed holds it: what AdamW moves is a copy in fp32, beside weights in the computed format."""
        found = self.states
        if not way.startswith("zero"):
            return found
        learnt = found.gradients // 4
        weights = learnt * self.autocast.itemsize if self.autocast else found.weights
        return dataclasses.replace(found, weights=weights, moments=found.moments + 4 * learnt)

    @cached_property
    def with_gradients_there(self) -> Case:
        """The same with gradients that stay from step to step, in the buckets through which processes talk."""
        return dataclasses.replace(self, accumulates=True)

    @cached_property
    def with_gradients_given_away(self) -> Case:
        """The same with each gradient going to the process that keeps it."""
        return dataclasses.replace(self, spread=True)

    @cached_property
    def with_weights_in_shares(self) -> Case:
        """The same where no process holds a whole model, so that its head is not called piece by piece."""
        return dataclasses.replace(self.with_gradients_given_away, in_shares=True)

    def with_batch(self, batch_size: int) -> Case:
        """The same with the `batch_size` longest examples in one batch."""
        rows = largest_possible(self.items, batch_size, self.rows.padded)
        return dataclasses.replace(self, rows=rows, batch_size=batch_size)

    @cached_property
    def rehearsed(self) -> Rehearsed:
        """The batch that needs most, of all that the stage does with one."""
        act = _ACT[self.stage]
        if self.in_shares and act == "next token":
            act = "next token at once"
        manner = Manner(act, self.checkpointing, self.autocast, self.accumulates, self.spread)
        found = rehearse(self.outline, self.rows, manner)
        if self.roles is None:
            return found
        value = Manner("value", self.checkpointing, self.autocast, spread=self.spread)
        acts = [found, rehearse(self.outline, self.rows, value)] if self.roles.has_value else [found]
        acts.append(rehearse(self.outline, self.rows, Manner("look back")))
        return max(acts, key=lambda one: one.peak)

    @cached_property
    def cache(self) -> int:
        """Keys and values of the answers that are drawn together, at their longest."""
        if self.roles is None:
            return 0
        return cache_of(self.outline, self.roles.drawn, self.roles.new_tokens).total

    @cached_property
    def answering(self) -> int:
        """Bytes beside the weights while answers are drawn, the cache included."""
        if self.roles is None:
            return 0
        return self.cache + rehearse(self.outline, self.roles.drawn, Manner("answer")).peak


_ACT: dict[str, Any] = {"sft": "next token", "pretrain": "next token", "reward": "score", "rl": "policy"}


def cache_of(outline: Outline, drawn: Rows, new_tokens: int) -> Cached:
    """The cache of rows that are answered together, at their longest."""
    return cached(outline, len(drawn.lengths), max(drawn.lengths) + new_tokens)


def needs(case: Case, way: str | None = None, devices: int | None = None) -> dict[str, int]:
    """Bytes by part on each of `devices`; "peak" is their sum, or what loading takes where that is more."""
    way, devices = way or case.parallel, devices or case.devices
    whole = case.held(way)
    part = memory.sharded(whole, way, devices)
    step = memory.step_bytes(part.gradients // 4, way, case.on_gpu)
    batch = max(_beside_states(case, way, devices), case.answering - part.gradients, step, 0)
    found = {
        "program": case.program,
        "frozen": part.frozen,
        "learning": part.weights,
        "gradients": part.gradients,
        "moments": part.moments,
        "exchange": _exchange(case, whole, way, devices),
        "batch": batch,
        "slack": _allowance(case, batch),
    }
    loading = case.program + whole.frozen + whole.weights + (0 if case.on_gpu else case.file)
    return {**found, "peak": max(sum(found.values()), loading), "loading": loading}


def _allowance(case: Case, batch: int) -> int:
    """What the allocator takes beside `batch` bytes that come and go."""
    if case.on_gpu:
        return round(SLACK_ON_GPU * batch)
    return round(SLACK_ON_CPU * batch) + HEAP_KEPT


def _beside_states(case: Case, way: str, devices: int) -> int:
    """Bytes of the batch, the gradients that stay after it aside."""
    if way in ("zero3", "fsdp"):
        return case.with_weights_in_shares.rehearsed.peak
    if way == "zero2":
        return case.with_gradients_given_away.rehearsed.peak
    if devices > 1:
        case = case.with_gradients_there
    return case.rehearsed.peak - case.states.gradients


def _exchange(case: Case, whole: States, way: str, devices: int) -> int:
    element = (case.autocast or case.outline.dtype).itemsize
    weights = (whole.frozen + whole.weights) // element
    tables = case.parameters.embeddings
    layer = (weights - tables) // max(depth(case.outline.config), 1)
    return memory.exchange_bytes(weights, layer, tables, element, way, devices)


def largest_batch(case: Case, room: int) -> int | None:
    """How many of the longest examples fit together into `room` bytes; None where not even one does.

    Memory grows nearly evenly with the tokens of a batch: two rehearsals say about how many, further ones make sure, in
    steps of a sixteenth where there are many.
    """

    def fits(batch_size: int) -> bool:
        return needs(case.with_batch(batch_size))["peak"] <= room

    if not fits(1):
        return None
    most = len(case.items)
    found = min(_about(case, room), most)
    step = max(found // 16, 1)
    while found > 1 and not fits(found):
        found = max(found - step, 1)
    while found < most and fits(min(found + step, most)):
        found = min(found + step, most)
    return found


def _about(case: Case, room: int) -> int:
    """How many of the longest examples fit if memory grows evenly with tokens."""
    small, large = case.with_batch(1), case.with_batch(max(case.batch_size, 4))
    low, more = needs(small)["peak"], large.rows.tokens - small.rows.tokens
    a_token = (needs(large)["peak"] - low) / max(more, 1)
    if a_token <= 0:
        return 1
    budget = small.rows.tokens + (room - low) / a_token
    lengths = sorted((item.tokens for item in case.items), reverse=True)
    tokens = 0
    for number, length in enumerate(lengths):
        tokens = (number + 1) * lengths[0] if case.rows.padded else tokens + length
        if tokens > budget:
            return max(number, 1)
    return len(lengths)
