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
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example.

    Args:
        query: (1, heads, total, head_dim); key and value: (1, key_value_heads, total, head_dim).
        cu_seq_lens_q: (examples + 1,) where each example starts, and where the last one ends.
        sliding_window: how many tokens back a token sees, itself included; None for all.

    Returns:
        (1, total, heads, head_dim) and no attention weights.
    """
    bounds = cu_seq_lens_q.tolist()
    pieces = []
    for start, end in itertools.pairwise(bounds):
        length = end - start
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
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def is_exact(model: PreTrainedModel, tolerance: float = 1e-3) -> bool:
    """Whether `model` gives the same logits for two examples laid end to end as for each alone.

    False for models with a state that runs along the row (Mamba, convolutions), with positions that do not
    come from `position_ids` (ALiBi), or with an attention of their own. Asked of the model itself, because
    no list of architectures stays complete.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (length,), generator=generator).to(device) for length in (9, 6)]
    bounds = torch.tensor([0, 9, 15], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(len(row), device=device) for row in rows])
    training = model.training
    model.eval()
    try:
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        with for_batches(model, True):
            together = model(
                input_ids=torch.cat(rows)[None],
                position_ids=positions[None],
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                use_cache=False,
            ).logits[0]
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(training)
    scale = alone.abs().max().clamp(min=1.0)
    # Half-precision weights round differently for another order of the same sums.
    slack = tolerance if alone.dtype == torch.float32 else 50 * tolerance
    return bool(((together - alone).abs().max() / scale) < slack)
