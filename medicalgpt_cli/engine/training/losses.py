"""The loss of next-token prediction and log-probabilities, at target positions only and a piece at a time."""

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
from medicalgpt_cli.engine.training.ppo import mathematics

_NOT_INPUTS = ("labels", "shift_labels", "loss_weights")

# Logits that exist at one time: 128 MiB in fp32. All logits of a batch at once are most of a small model's memory
# (4 examples of 512 tokens over 49,152 words: 400 MB, four times over with their gradients).
_LOGITS = 2**25


def target_loss(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum of `target_nats`, each times its weight where the batch has `loss_weights`: a scalar with gradient."""
    nats = target_nats(model, batch)
    if "loss_weights" not in batch:
        return nats.sum()
    return (nats * batch["loss_weights"].flatten()[batch["shift_labels"].flatten() != IGNORED]).sum()


def target_nats(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """-log p(target) at each target position of a batch, row by row, in nats: (targets,), with gradient.

    Prompt positions are never projected to the vocabulary: on a 50,000-word vocabulary that projection
    is a third of a small model's work, and its result would be thrown away.

    Args:
        batch: input_ids and shift_labels, (rows, length), and what else the model's forward takes.
    """
    inputs = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
    labels = batch["shift_labels"].flatten()
    positions = (labels != IGNORED).nonzero().squeeze(1)
    return -log_probabilities(model, inputs, positions, labels[positions])[0]


def log_probabilities(
    model: torch.nn.Module,
    batch: Mapping[str, torch.Tensor],
    positions: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p of `tokens` at `positions`, and the entropy there if asked for: (kept,) in nats, with gradient.

    Args:
        batch: input_ids, (rows, length), and what else the model's forward takes.
        positions: (kept,), counted through all rows; each predicts the token at the same place of `tokens`.
    """
    length = batch["input_ids"].shape[1]
    rows, columns = positions // length, positions % length
    inputs = dict(batch)
    if _takes_positions(model):  # the same columns for each row
        inputs["logits_to_keep"], columns = torch.unique(columns, return_inverse=True)
    if not _head_comes_last(model):
        logits = model(**inputs, use_cache=False).logits[rows, columns]
        return of_logits(logits, tokens, temperature, entropy=entropy)
    head = _inner(model).get_output_embeddings()
    with _without(head):
        hidden = model(**inputs, use_cache=False).logits[rows, columns]
    return in_pieces(head, hidden, tokens, temperature, entropy=entropy)


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


def in_pieces(
    head: torch.nn.Module,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`log_probabilities` of hidden states (kept, width), never holding the logits of all of them."""
    rows, learns = max(_LOGITS // head.weight.shape[0], 1), torch.is_grad_enabled()
    is_frozen = type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
    if learns and is_frozen and not entropy:
        return _FrozenHead.apply(hidden, head.weight, tokens, temperature, rows), None

    def piece(states: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return of_logits(head(states), wanted, temperature, entropy=entropy)

    found, uncertain = [], []
    for states, wanted in zip(hidden.split(rows), tokens.split(rows), strict=True):
        one, other = (
            checkpoint(piece, states, wanted, use_reentrant=False) if learns else piece(states, wanted)
        )
        found.append(one)
        uncertain.append(other)
    return torch.cat(found), torch.cat(uncertain) if entropy else None


def of_logits(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`log_probabilities` of logits (kept, vocabulary)."""
    found = mathematics.log_probabilities(logits[None], tokens[None], temperature)[0]
    return found, mathematics.entropy(logits[None], temperature)[0] if entropy else None


class _FrozenHead(torch.autograd.Function):
    """The same where the head does not learn: what the gradient needs is computed while a piece's logits exist.

    d(-log p(token)) / d logits = (softmax(logits / temperature) - one_hot(token)) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        tokens: torch.Tensor,
        temperature: float,
        rows: int,
    ) -> torch.Tensor:
        found = []
        gradient = torch.empty_like(hidden)  # of each token's own -log p, times the temperature
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = F.linear(hidden[piece], weight)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if temperature != 1.0:
                logits.div_(temperature)
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            wanted = tokens[piece].unsqueeze(1)
            found.append((logits.gather(1, wanted) - normaliser).squeeze(1))
            error = logits.sub_(normaliser).exp_()
            error.scatter_add_(1, wanted, error.new_full(wanted.shape, -1.0))
            gradient[piece] = error.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.temperature = temperature
        return torch.cat(found) if found else hidden.new_empty(0)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = (-upstream / ctx.temperature).unsqueeze(1)
        return (scale * gradient).to(gradient.dtype), None, None, None, None
