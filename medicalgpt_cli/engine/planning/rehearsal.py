"""A step of training or answering without numbers: which tensors live when, in bytes.

The model is that of `skeleton.py`, and its own code runs, with our attention and our loss, PEFT's adapters and torch's
automatic differentiation, over fake tensors (torch._subclasses): they have a shape, a format and a lifetime, and no
content. What is counted is therefore what the installed versions really keep for the backward pass.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import DynamicCache

from medicalgpt_cli.engine.model.parts import body_of
from medicalgpt_cli.engine.planning.skeleton import UNKNOWN, Outline, build, depth
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.losses import in_pieces, of_logits

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is said by us

# A pass over all layers takes seconds where there are many: two short models tell the rest of a longer one than this.
_LONG = 4

Act = Literal["next token", "next token at once", "score", "policy", "value", "look back", "answer"]


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass: their lengths in tokens, and what is predicted of them."""

    lengths: tuple[int, ...]
    targets: int = 0  # positions with a loss, of all rows together
    padded: bool = False
    prefixes: tuple[
        tuple[int, int], ...
    ] = ()  # where rows begin elsewhere (`attention.py`); empty: none does

    @property
    def tokens(self) -> int:
        """Positions that are computed, padding included."""
        return len(self.lengths) * max(self.lengths) if self.padded else sum(self.lengths)


@dataclass(frozen=True)
class Rehearsed:
    """Bytes beside the weights."""

    kept: int  # when the backward pass begins; 0 where there is none
    peak: int  # at most at any one time, gradients included where they stay


@dataclass(frozen=True)
class Manner:
    """How a step is computed."""

    act: Act
    checkpointing: bool = False
    autocast: torch.dtype | None = None
    accumulates: bool = False  # gradients of an earlier batch are there when a batch begins
    spread: bool = False  # each gradient goes to the process that keeps it as soon as it is there


def rehearse(plan: Outline, rows: Rows, manner: Manner) -> Rehearsed:
    """What one batch needs beside the weights.

    Raises:
        NotImplementedError: the model does something that depends on numbers, or that fake tensors cannot do.
    """
    return Rehearsed(*_of_all_layers(plan, lambda layers: _rehearse(plan, rows, manner, layers)))


def _of_all_layers(plan: Outline, measure: Callable[[int | None], tuple[int, int]]) -> tuple[int, int]:
    """What `measure` finds of a model with all its layers, told from two short ones where these can tell."""
    whole = depth(plan.config)
    if whole <= _LONG or plan.stand_ins is None:
        return measure(None)
    few, more = plan.stand_ins
    one, other = (
        b + (b - a) * (whole - more) // (more - few) for a, b in zip(measure(few), measure(more), strict=True)
    )
    return one, other


def lies_end_to_end(plan: Outline) -> bool:
    """Whether our attention computes what the model asks of it; where it does not, batches will be padded."""
    manner = Manner("score" if plan.kind == "reward" else "next token")
    few = plan.stand_ins[0] if plan.stand_ins and depth(plan.config) > _LONG else None
    try:
        _rehearse(plan, Rows((3, 2), 2), manner, few)
    except NotImplementedError as problem:
        return not isinstance(problem.__cause__, attention.NotKept)
    return True


def _rehearse(plan: Outline, rows: Rows, manner: Manner, layers: int | None) -> tuple[int, int]:
    """Bytes kept for the backward pass, and the peak."""
    model = build(plan, layers)
    if manner.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    backward = manner.act not in ("look back", "answer")
    # rl switches dropout off; the library computes layers anew in training mode alone.
    model.train(manner.act in ("next token", "next token at once", "score") or manner.checkpointing)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model)
            batch = _batch(rows, answering=manner.act == "answer")
            autocast = torch.autocast("cpu", manner.autocast) if manner.autocast else contextlib.nullcontext()
            if manner.spread:
                _give_gradients_away(model)
            lifetimes = _Lifetimes(model)
            end_to_end = not rows.padded and manner.act != "answer"
            with attention.for_batches(model, end_to_end), torch.set_grad_enabled(backward), lifetimes:
                for _ in range(2 if manner.accumulates and backward else 1):
                    lifetimes.peak = 0
                    with autocast:
                        result = _ACTS[manner.act](model, batch, rows)
                    kept = lifetimes.alive if backward else 0
                    if backward:
                        result.backward()
                    del result
        return kept, lifetimes.peak
    except UNKNOWN as problem:
        raise NotImplementedError(f"{type(problem).__name__}: {problem}") from problem


@dataclass(frozen=True)
class Cached:
    """Bytes of what a model remembers of its rows: keys and values, and states that run along a row."""

    total: int
    largest: int  # of its tensors


def cached(plan: Outline, rows: int, positions: int) -> Cached:
    """What the model's own cache holds of `rows` rows of `positions` tokens each.

    The model fills it: layers have heads of their own, some share theirs, some see a window only, some keep a state.

    Raises:
        NotImplementedError: the model does something that depends on numbers, or that fake tensors cannot do.
    """
    whole = replace(plan, tuning=None, adapter=None)
    return Cached(*_of_all_layers(whole, lambda layers: _cached(whole, rows, positions, layers)))


@torch.no_grad()
def _cached(plan: Outline, rows: int, positions: int, layers: int | None) -> tuple[int, int]:
    model = build(plan, layers).eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model)
            batch = _batch(Rows((positions,) * rows, 0, True), answering=True)
            cache = DynamicCache(config=model.config)
            with _Lifetimes(model):
                model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
            held = [
                one.numel() * one.element_size()
                for layer in cache.layers
                for one in tree_iter(vars(layer))
                if isinstance(one, torch.Tensor) and one.dim() > 0
            ]
    except UNKNOWN as problem:
        raise NotImplementedError(f"{type(problem).__name__}: {problem}") from problem
    return sum(held), max(held, default=0)


def _give_gradients_away(model: torch.nn.Module) -> None:
    def forget(weight: torch.Tensor) -> None:
        weight.grad = None

    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(forget)


class _Bounds(list):
    """Where rows begin and end, for our attention, which asks for a list: fake tensors have no numbers."""

    def tolist(self) -> list[int]:
        return list(self)


def _batch(rows: Rows, answering: bool) -> dict[str, Any]:
    if rows.padded or answering:
        shape = (len(rows.lengths), max(rows.lengths))
        whole = torch.ones(shape, dtype=torch.long)
        places = {"position_ids": torch.zeros(shape, dtype=torch.long)} if answering else {}
        return {"input_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": whole, **places}
    bounds = _Bounds([0])
    for length in rows.lengths:
        bounds.append(bounds[-1] + length)
    shape = (1, rows.tokens)
    borrowed = {"prefixes": _Bounds(rows.prefixes)} if rows.prefixes else {}
    return {
        **borrowed,
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
    }


# -- what is computed ----------------------------------------------------------------------------------------


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hidden(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return body_of(model)(**batch, use_cache=False).last_hidden_state


def _at(hidden: torch.Tensor, positions: int) -> torch.Tensor:
    return hidden.flatten(0, 1)[torch.zeros(positions, dtype=torch.long)]


def _changes_logits(config: Any) -> bool:
    """Whether the logits are more than the head's output, so that they are all there at once."""
    names = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
    return any(getattr(config.get_text_config(), name, None) not in (None, 1, 1.0) for name in names)


def _score(model: Any, batch: dict[str, Any], rows: Rows) -> torch.Tensor:
    hidden = _hidden(model, batch)
    return _at(hidden, len(rows.lengths)).float().sum()


def _log_probabilities(
    model: Any, batch: dict[str, Any], rows: Rows, *, entropy: bool = False, at_once: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`losses.log_probabilities`, which asks the model with numbers what its logits are."""
    inner, tokens = _inner(model), torch.zeros(rows.targets, dtype=torch.long)
    if at_once or _changes_logits(inner.config):
        columns = tokens[: -(-rows.targets // batch["input_ids"].shape[0])]
        logits = inner(**batch, use_cache=False, logits_to_keep=columns).logits
        return of_logits(_at(logits, rows.targets), tokens, entropy=entropy)
    hidden = _at(_at(_hidden(model, batch), rows.targets)[None], rows.targets)
    return in_pieces(inner.get_output_embeddings(), hidden, tokens, entropy=entropy)


def _next_token(model: Any, batch: dict[str, Any], rows: Rows) -> torch.Tensor:
    return _log_probabilities(model, batch, rows)[0].sum()


def _next_token_at_once(model: Any, batch: dict[str, Any], rows: Rows) -> torch.Tensor:
    """Where processes share the weights, the head is a part of the model's forward pass (`losses.py`)."""
    return _log_probabilities(model, batch, rows, at_once=True)[0].sum()


def _value(model: Any, batch: dict[str, Any], rows: Rows) -> torch.Tensor:
    return _at(_hidden(model, batch), rows.targets).float().sum()


def _look_back(model: Any, batch: dict[str, Any], rows: Rows) -> Any:
    return _log_probabilities(model, batch, rows, entropy=True)


def _answer(model: Any, batch: dict[str, Any], rows: Rows) -> torch.Tensor:
    """Reading the prompts; the cache itself is `cached`."""
    return _inner(model)(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].float()


_ACTS: dict[str, Any] = {
    "next token": _next_token,
    "next token at once": _next_token_at_once,
    "score": _score,
    "policy": _next_token,  # its loss is of the same log-probabilities
    "value": _value,
    "look back": _look_back,
    "answer": _answer,
}


# -- fake tensors --------------------------------------------------------------------------------------------


def _make_fake(model: torch.nn.Module) -> None:
    """Give every weight and buffer a fake tensor of its shape and format; shared ones stay shared."""
    found: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in found:
                    empty = torch.empty(weight.shape, dtype=weight.dtype)
                    found[id(weight)] = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)
                module._parameters[name] = found[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The shape of each expert's product with its rows, of which there are as many whoever gets them.

    (rows, a) and (experts, a, b) give (rows, b); in the backward pass (a, rows) and (rows, b) give (experts, a, b).
    torch's own stand-in refuses fp32, which its operation takes.
    """
    shape = (left.shape[0], right.shape[-1])
    return left.new_empty(shape if right.dim() == 3 else (ends.shape[0], *shape))


class _Lifetimes(TorchDispatchMode):
    """Bytes of all tensors that are alive, the model's own aside, and the most there were."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.alive = self.peak = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._held = [one.untyped_storage() for one in tensors]  # so that their numbers stay theirs
        self._known: dict[int, int] = {one._cdata: 0 for one in self._held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default:
            result = _grouped_product(*args[:3])
        else:
            result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.logsumexp.default:  # exp(x - max), which the operation makes inside
            self.peak = max(self.peak, self.alive + args[0].untyped_storage().nbytes())
        for one in tree_iter(result):
            if isinstance(one, torch.Tensor):
                self._born(one.untyped_storage())
        return result

    def _born(self, storage: Any) -> None:
        number = storage._cdata
        if number in self._known:
            return
        self._known[number] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, number)

    def _gone(self, number: int) -> None:
        self.alive -= self._known.pop(number)
