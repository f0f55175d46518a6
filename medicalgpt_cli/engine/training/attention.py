"""Training without padding: the examples of a batch lie end to end in one row, and attention stays inside each.

Hugging Face models look their attention function up by name; ours runs causal attention once per example.
Without it the row would need a dense mask of (total length)² (sdpa), and most of it would be masked away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from medicalgpt_cli.engine.model.longrope import switches

NAME = "medgpt_padding_free"
# Keywords that travel to the attention function without changing what it computes. Any other one may: a cap on the
# scores, sinks, a bias, chosen tokens.
_WITHOUT_EFFECT = frozenset(
    {
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "position_ids",
        "deterministic",
        "num_items_in_batch",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)


class NotKept(ValueError):
    """What a model's attention does beyond what ours computes. The message is a phrase: "its attention ..."."""


@dataclass(frozen=True)
class LocalMask:
    """What the library would make a mask of, in the place of the mask: attention that does not see all before it."""

    size: int | None  # tokens of the window or chunk; None where it is more than that

    def __getitem__(self, positions: tuple[slice, ...]) -> LocalMask:
        """Gemma 4 cuts a mask to the positions that it goes on with, which are all of them as we call it."""
        everything = all(part in (slice(None), slice(0, None)) for part in positions)
        return self if everything else LocalMask(None)


def _mask(*, local_size: int | None = None, use_vmap: bool = False, **_: object) -> LocalMask | None:
    """The library asks for a mask of a whole row; ours is causal inside each example and needs none.

    Args:
        local_size: of a sliding window or a chunk. use_vmap: set where a model has added a mask function of its own.
    """
    if use_vmap:
        return LocalMask(None)
    return None if local_size is None else LocalMask(local_size)


def padding_free_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LocalMask | torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    prefixes: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example, and from there to the prefix that it borrows.

    Args:
        query: (1, heads, total, head_dim); key and value: (1, key_value_heads, total, head_dim).
        cu_seq_lens_q: (examples + 1,) where each example starts, and where the last one ends.
        prefixes: (examples, 2) start and end of the tokens elsewhere in the row that an example continues,
            equal where it continues none: the prompt of another answer, say.
        sliding_window: how many tokens back a token sees, itself included; None for all.

    Returns:
        (1, total, heads, head_dim) and no attention weights.

    Raises:
        NotKept: the model asks for what is not computed here.
        ValueError: prefixes in a layer with a sliding window.
    """
    _must_compute(attention_mask, sliding_window, is_causal, others)
    if prefixes is not None and sliding_window is not None:
        raise ValueError("no prefixes in layers with a sliding window")
    bounds = cu_seq_lens_q.tolist()
    borrowed = [(0, 0)] * (len(bounds) - 1) if prefixes is None else prefixes.tolist()
    pieces = []
    for (start, end), (first, last) in zip(itertools.pairwise(bounds), borrowed, strict=True):
        length = end - start
        if first < last:
            pieces.append(_behind(query, key, value, (first, last), (start, end), scaling, dropout))
            continue
        window = None
        if sliding_window is not None and length > sliding_window:
            position = torch.arange(length, device=query.device)
            distance = position[:, None] - position[None, :]
            window = (distance >= 0) & (distance < sliding_window)
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=window,
                dropout_p=dropout,
                is_causal=window is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _must_compute(
    mask: LocalMask | torch.Tensor | None,
    sliding_window: int | None,
    is_causal: bool | None,
    others: dict[str, object],
) -> None:
    """Refuse what a short row would not show: caps, sinks, and what only the mask of a long row knows."""
    asked = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if asked:
        raise NotKept(f"its attention takes {', '.join(asked)}")
    if is_causal is False:
        raise NotKept("its attention is not causal")
    size = mask.size if isinstance(mask, LocalMask) else None
    if isinstance(mask, torch.Tensor) or (isinstance(mask, LocalMask) and size is None):
        raise NotKept("its attention has a mask of its own")
    if size != sliding_window:
        raise NotKept(f"only a mask knows that its attention ends {size or sliding_window} tokens back")


def _behind(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: tuple[int, int],
    example: tuple[int, int],
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """The attention of `example` behind `prefix`, (1, heads, length, head_dim).

    The prefix asks, too, and what it is told is thrown away: causal attention without a mask, the one that has
    fast kernels on every device, wants as many queries as keys. What the prefix costs is the linear layers.
    """
    whole = [
        torch.cat([states[:, :, prefix[0] : prefix[1]], states[:, :, example[0] : example[1]]], dim=2)
        for states in (query, key, value)
    ]
    attended = F.scaled_dot_product_attention(
        *whole,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[:, :, prefix[1] - prefix[0] :]


AttentionInterface.register(NAME, padding_free_attention)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def for_batches(model: PreTrainedModel, padding_free: bool) -> Iterator[None]:
    """Inside, `model` takes rows of examples laid end to end; outside, its own attention is back.

    An implementation that was chosen (`choose`) takes padded batches, too; ours does nothing for them.
    """
    chosen, compute = _chosen(model)
    before = model.config._attn_implementation
    if before == chosen or (chosen == NAME and not padding_free):  # already inside, or nothing to do
        yield
        return
    inner = _inner(model)
    # A model that takes no other attention than its own does not show that it is inside already.
    outside = vars(inner).get("_medgpt_own_attention")
    inner._medgpt_own_attention = before
    model.set_attn_implementation(chosen)
    try:
        with _for_flash(model, compute) if "flash" in chosen else nullcontext():
            yield
    finally:
        model.set_attn_implementation(before)
        if outside is None:
            del inner._medgpt_own_attention
        else:
            inner._medgpt_own_attention = outside


@contextmanager
def own(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` computes with the attention that it had outside `for_batches`: ours has no cache."""
    if model.config._attn_implementation != NAME:
        yield
        return
    model.set_attn_implementation(_inner(model)._medgpt_own_attention)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def choose(model: PreTrainedModel, implementation: str, compute: torch.dtype) -> None:
    """Let an implementation of the library's compute attention inside `for_batches`.

    Args:
        compute: what FlashAttention computes in, which takes no fp32.
    """
    _inner(model)._medgpt_attention = (implementation, compute)


def _chosen(model: PreTrainedModel) -> tuple[str, torch.dtype]:
    return getattr(_inner(model), "_medgpt_attention", (NAME, torch.float32))


def _inner(model: PreTrainedModel) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _for_flash(model: PreTrainedModel, compute: torch.dtype) -> Iterator[None]:
    """What the library's FlashAttention wants beside a batch: the longest example's length, and half precision."""

    def with_longest(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        bounds = named.get("cu_seq_lens_q")
        if bounds is None:
            return given, named
        longest = int(bounds.diff().max())  # once here, and not in every layer
        return given, {**named, "max_length_q": longest, "max_length_k": longest}

    hook = _inner(model).base_model.register_forward_pre_hook(with_longest, with_kwargs=True)
    weight = model.get_input_embeddings().weight
    try:
        # Weights that all learn are held in fp32; the trainer's autocast does not reach what is measured outside.
        with torch.autocast(weight.device.type, compute, enabled=weight.dtype == torch.float32):
            yield
    finally:
        hook.remove()


def is_exact(model: PreTrainedModel, tolerance: float = 1e-3) -> bool:
    """Whether `model` makes the same of two examples laid end to end as of each alone."""
    return hindrance(model, tolerance) is None


def hindrance(model: PreTrainedModel, tolerance: float = 1e-3) -> str | None:
    """Why `model` does not make the same of two examples laid end to end as of each alone; None where it does.

    A state that runs along the row (Mamba, convolutions), positions that do not come from `position_ids` (ALiBi), an
    attention of its own, or one that takes more than ours computes, which holds for rows of any length. Asked of the
    model itself, because no list of architectures stays complete.
    """
    return _difference(model, tolerance, shared=0)


def borrows_prefixes(model: PreTrainedModel, tolerance: float = 1e-3) -> bool:
    """Whether `model` makes the same of two examples with one beginning when that is computed only once.

    False for what `is_exact` refuses, for models with sliding windows, for those in which the beginning depends on the
    length of the whole, and for the library's own attention.
    """
    if _chosen(model)[0] != NAME or switches(model):
        return False
    return _difference(model, tolerance, shared=4) is None


@torch.no_grad()
def _difference(model: PreTrainedModel, tolerance: float, shared: int) -> str | None:
    """Why two rows of tokens differ alone, and end to end without the second copy of their first `shared` ones."""
    device = model.get_input_embeddings().weight.device
    # A table that processes share does not show its shape.
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (length,), generator=generator).to(device) for length in (9, 6)]
    rows[1][:shared] = rows[0][:shared]
    bounds = torch.tensor([0, 9, 15 - shared], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(9, device=device), torch.arange(shared, 6, device=device)])
    borrowed = {"prefixes": torch.tensor([[0, 0], [0, shared]], device=device)} if shared else {}
    training = model.training
    model.eval()
    try:
        # The model as a whole: of one that processes share, no part can be called. A reward model scores every token.
        alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
        with for_batches(model, True):
            together = model(
                input_ids=torch.cat([rows[0], rows[1][shared:]])[None],
                position_ids=positions[None],
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                use_cache=False,
                **borrowed,
            ).logits[0]
    except NotKept as reason:
        return str(reason)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return "it does not take rows laid end to end"
    finally:
        model.train(training)
    expected = torch.cat([alone[0], alone[1][shared:]])
    scale = expected.abs().max().clamp(min=1.0)
    # Half precision rounds differently for another order of the same sums.
    half = expected.dtype != torch.float32 or "flash" in _chosen(model)[0]
    slack = 50 * tolerance if half else tolerance
    if (together - expected).abs().max() / scale < slack:
        return None
    return "its examples see each other"
