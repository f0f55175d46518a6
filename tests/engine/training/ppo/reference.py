"""PPO's formulas once more: slow, over lists of plain floats, as the papers write them.

A batch is a list of rows; a row is a list of one number for each position. The masks are lists of booleans.
"""

from __future__ import annotations

import math

Rows = list[list[float]]
Masks = list[list[bool]]


def kept(rows: Rows, mask: Masks) -> list[float]:
    """The entries under the mask, in one list."""
    return [x for row, keep in zip(rows, mask, strict=True) for x, k in zip(row, keep, strict=True) if k]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def variance(values: list[float]) -> float:
    centre = mean(values)
    return mean([(x - centre) ** 2 for x in values])


def whiten(rows: Rows, mask: Masks, shift_mean: bool) -> Rows:
    values = kept(rows, mask)
    centre, scale = mean(values), math.sqrt(variance(values) + 1e-8)
    result = [[0.0] * len(row) for row in rows]
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            if mask[i][j]:
                result[i][j] = (x - centre) / scale + (0.0 if shift_mean else centre)
    return result


def probabilities(logits: list[float], temperature: float = 1.0) -> list[float]:
    highest = max(logits)
    weights = [math.exp((x - highest) / temperature) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def entropy(logits: list[float], temperature: float = 1.0) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities(logits, temperature) if p > 0)


def k3(logp: float, ref: float) -> float:
    ratio = math.exp(ref - logp)
    return ratio - 1 - math.log(ratio)


def token_rewards(scores: list[float], logp: Rows, ref: Rows, mask: Masks, coefficient: float) -> Rows:
    rewards = [[0.0] * len(row) for row in logp]
    for i, keep in enumerate(mask):
        last = None
        for j, k in enumerate(keep):
            if k:
                rewards[i][j] = -coefficient * (logp[i][j] - ref[i][j])
                last = j
        if last is not None:
            rewards[i][last] += scores[i]
    return rewards


def gae(rewards: Rows, values: Rows, mask: Masks, gamma: float, lam: float) -> tuple[Rows, Rows]:
    """The textbook sum over l of (gamma * lam)^l * delta_{t+l}, over each response without its padding."""
    advantages = [[0.0] * len(row) for row in values]
    returns = [[0.0] * len(row) for row in values]
    for i, keep in enumerate(mask):
        length = sum(keep)
        for t in range(length):
            for ahead in range(length - t):
                now = t + ahead
                after = values[i][now + 1] if now + 1 < length else 0.0
                delta = rewards[i][now] + gamma * after - values[i][now]
                advantages[i][t] += (gamma * lam) ** ahead * delta
            returns[i][t] = advantages[i][t] + values[i][t]
    return advantages, returns


def policy_loss(logp: Rows, old: Rows, advantages: Rows, mask: Masks, clip: float) -> dict[str, float]:
    losses, clipped, kl, ratios = [], [], [], []
    for new, before, advantage in zip(kept(logp, mask), kept(old, mask), kept(advantages, mask), strict=True):
        ratio = math.exp(new - before)
        held = min(max(ratio, 1 - clip), 1 + clip)
        losses.append(-min(ratio * advantage, held * advantage))
        clipped.append(float(held * advantage < ratio * advantage))
        kl.append(k3(before, new))
        ratios.append(ratio)
    return {
        "loss": mean(losses),
        "clip_fraction": mean(clipped),
        "approx_kl": mean(kl),
        "mean_ratio": mean(ratios),
    }


def value_loss(
    values: Rows, old: Rows, returns: Rows, mask: Masks, clip: float | None
) -> tuple[float, float]:
    losses, clipped = [], []
    for value, before, target in zip(kept(values, mask), kept(old, mask), kept(returns, mask), strict=True):
        free = worse = (value - target) * (value - target)
        if clip is not None:
            error = before + min(max(value - before, -clip), clip) - target
            worse = max(free, error * error)
        losses.append(0.5 * worse)
        clipped.append(float(worse > free))
    return mean(losses), mean(clipped)
