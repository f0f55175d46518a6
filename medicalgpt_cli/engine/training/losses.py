"""The loss of next-token prediction, at target positions only and a piece at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from medicalgpt_cli.engine.model.spread import is_spread
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.batches import IGNORED

# Logits that exist at one time: 128 MiB in fp32. All logits of a batch at once are most of a small model's memory
# (4 examples of 512 tokens over 49,152 words: 400 MB, four times over with their gradients).
_LOGITS = 2**25


def target_loss(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum of -log p(target) over the target positions of a batch, in nats; a scalar with gradient.

    Prompt positions are never projected to the vocabulary: on a 50,000-word vocabulary that projection
    is a third of a small model's work, and its result would be thrown away.

    Args:
        batch: input_ids and shift_labels, (rows, length), and what else the model's forward takes.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    labels = batch["shift_labels"]
    is_target = labels != IGNORED
    columns = is_target.any(dim=0).nonzero().squeeze(1)  # (kept,) the same columns for each row
    keep = is_target[:, columns]  # (rows, kept)
    targets = labels[:, columns][keep]
    if _takes_positions(model):
        inputs["logits_to_keep"] = columns
        if _head_comes_last(model):
            head = _inner(model).get_output_embeddings()
            with _without(head):
                hidden = model(**inputs, use_cache=False).logits
            return loss_in_pieces(head, hidden[keep], targets)
        logits = model(**inputs, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns]
    return F.cross_entropy(logits[keep].float(), targets, reduction="sum")


def _inner(model: torch.nn.Module) -> Any:
    inner: Any = model.module if hasattr(model, "module") else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _takes_positions(model: torch.nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(_inner(model).forward).parameters


@contextmanager
def _without(head: torch.nn.Module) -> Iterator[None]:
    """Inside, the model's `logits` are what its head would have been given."""
    head.forward = lambda hidden: hidden  # an entry of the instance, in front of the class's method
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def _head_comes_last(model: torch.nn.Module) -> bool:
    """Whether the logits are the head's output as it is: some models scale or cap them. Asked once a model."""
    inner = _inner(model)
    if is_spread(inner):
        return False
    if not hasattr(inner, "_medgpt_head_comes_last"):
        training = model.training
        model.eval()
        try:
            head = inner.get_output_embeddings()
            ids = torch.tensor([[0, 1, 2]], device=next(inner.parameters()).device)
            asked = {"input_ids": ids, "use_cache": False}
            if inner.config._attn_implementation == attention.NAME:  # which asks where rows begin
                asked |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 3]))
            logits = inner(**asked).logits
            with _without(head):
                hidden = inner(**asked).logits
            inner._medgpt_head_comes_last = bool(torch.equal(head(hidden), logits))
        except (AttributeError, RuntimeError, TypeError):
            inner._medgpt_head_comes_last = False
        finally:
            model.train(training)
    return inner._medgpt_head_comes_last and "forward" not in vars(inner.get_output_embeddings())


def loss_in_pieces(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target) for hidden states (kept, width), never holding the logits of all of them."""
    rows = max(_LOGITS // _vocabulary(head), 1)
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        return _FrozenHead.apply(hidden, head.weight, targets, rows)
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_piece, head, states, wanted, use_reentrant=False)
        else:
            total = total + _piece(head, states, wanted)
    return total


def _vocabulary(head: torch.nn.Module) -> int:
    return head.weight.shape[0]


def _piece(head: torch.nn.Module, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(states).float(), wanted, reduction="sum")


class _FrozenHead(torch.autograd.Function):
    """The same where the head does not learn: the gradient of a piece is computed while its logits exist.

    d(-log p(target)) / d logits = softmax(logits) - one_hot(target).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int
    ) -> torch.Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = F.linear(hidden[piece], weight).float()
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            wanted = targets[piece].unsqueeze(1)
            total += (normaliser - logits.gather(1, wanted)).sum()
            if gradient is not None:
                error = logits.sub_(normaliser).exp_()
                error.scatter_add_(1, wanted, error.new_full(wanted.shape, -1.0))
                gradient[piece] = error.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None
