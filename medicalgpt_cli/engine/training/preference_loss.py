"""The loss of a reward model on pairs of answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centring: float = 0.0
) -> Tensor:
    """Mean of -log p(chosen beats rejected), a scalar in nats, at least in float32.

    Bradley & Terry 1952: p = sigmoid(chosen - rejected).

    Args:
        chosen, rejected: (pairs,) scores.
        margin: (pairs,) how far the chosen score shall lie above the rejected one, taken off the difference
            (Touvron et al. 2023, "Llama 2").
        centring: weight of the mean of (chosen + rejected)^2, which holds the scores' level, that pairs leave
            free, near 0 (Eisenstein et al. 2023, "Helping or Herding?").
    """
    dtype = torch.promote_types(chosen.dtype, torch.float32)  # bfloat16 has three digits
    chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -F.logsigmoid(difference).mean()
    return loss + centring * (chosen + rejected).square().mean() if centring else loss
