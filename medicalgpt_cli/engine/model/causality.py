"""Whether a model predicts each token from those before it alone.

The library lists encoders among its causal language models. Such a model sees the very token that it is to predict: its
loss falls to nothing, and what it then says is noise.
"""

from __future__ import annotations

from typing import Any

import torch

from medicalgpt_cli.engine.model.spread import is_spread
from medicalgpt_cli.errors import UsageError

_LENGTH = 4  # tokens


@torch.no_grad()
def must_be_causal(model: Any, name: str) -> None:
    """Ask the model itself: two rows that differ in their last token have to get the same scores before it.

    Raises:
        UsageError: they do not.
    """
    weight = model.get_input_embeddings().weight
    if is_spread(model) or weight.is_meta:
        return
    rows = torch.arange(3, 3 + _LENGTH, device=weight.device).expand(2, _LENGTH).clone() % len(weight)
    rows[1, -1] = 0
    try:
        scores = model.eval()(input_ids=rows, use_cache=False).logits[:, : _LENGTH - 1].float()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return  # what cannot be asked fails, or not, where it is used
    # Half precision rounds two rows differently, and may send them to other experts.
    slack = 1e-3 if weight.dtype == torch.float32 else 0.1
    if (scores[0] - scores[1]).norm() > slack * scores.norm():
        raise UsageError(
            f"{name} sees the tokens that it is to predict: it is no causal language model",
            'an encoder such as BERT becomes one with "is_decoder": true in its config.json; '
            "else take another model",
        )
