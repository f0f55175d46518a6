"""Training without padding: the examples of a batch lie end to end in one row, and attention stays inside each.

Hugging Face models look their attention function up by name; ours runs causal attention once per example.
Without it the row would need a dense mask of (total length)² (sdpa), and most of it would be masked away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

NAME = "medgpt_padding_free"


def padding_free_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    prefixes: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
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
        ValueError: prefixes in a layer with a sliding window.
    """
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


@contextmanager
def for_batches(model: PreTrainedModel, padding_free: bool) -> Iterator[None]:
    """Inside, `model` takes rows of examples laid end to end; outside, its own attention is back.

    Does nothing for padded batches (`padding_free` False).
    """
    if not padding_free:
        yield
        return
    before = model.config._attn_implementation
    if before == NAME:  # already inside
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def is_exact(model: PreTrainedModel, tolerance: float = 1e-3) -> bool:
    """Whether `model` makes the same of two examples laid end to end as of each alone.

    False for models with a state that runs along the row (Mamba, convolutions), with positions that do not
    come from `position_ids` (ALiBi), or with an attention of their own. Asked of the model itself, because
    no list of architectures stays complete.
    """
    return _same(model, tolerance, shared=0)


def borrows_prefixes(model: PreTrainedModel, tolerance: float = 1e-3) -> bool:
    """Whether `model` makes the same of two examples with one beginning when that is computed only once.

    False for what `is_exact` refuses, and for models with sliding windows.
    """
    return _same(model, tolerance, shared=4)


@torch.no_grad()
def _same(model: PreTrainedModel, tolerance: float, shared: int) -> bool:
    """Two rows of tokens with their first `shared` ones in common: alone, and end to end without the second copy."""
    device = model.get_input_embeddings().weight.device
    vocabulary = (
        model.config.get_text_config().vocab_size
    )  # a table that processes share does not show its shape
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
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(training)
    expected = torch.cat([alone[0], alone[1][shared:]])
    scale = expected.abs().max().clamp(min=1.0)
    # Half-precision weights round differently for another order of the same sums.
    slack = tolerance if expected.dtype == torch.float32 else 50 * tolerance
    return bool(((together - expected).abs().max() / scale) < slack)
