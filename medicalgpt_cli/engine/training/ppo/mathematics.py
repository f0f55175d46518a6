"""The mathematics of PPO for language models: pure functions of tensors, and two small running states.

Unless said otherwise a tensor is (batch, length) over response positions and comes with a boolean `mask`: True
at the response's tokens, its end token among them, False to their right. What stands at this padding, NaN and
infinity too, changes neither values nor gradients: it is replaced before it is used, because a gradient of 0
multiplied by NaN is NaN. Log-probabilities and KL are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# exp overflows float32 at 88, and an infinite ratio makes the zero gradient of a clipped token NaN.
MAX_LOG_RATIO = 60.0
VARIANCE_FLOOR = 1e-8  # where a standard deviation of advantages is divided by
SINGLE_PRECISION = 1e-6  # of a score's size: differences below are rounding


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0)


def _tokens(mask: Tensor) -> Tensor:
    return mask.sum().clamp(min=1)  # the sums over an empty mask are 0, and so shall be their means


# ---- means over tokens


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over all masked entries of the batch, a scalar; 0 where there is none."""
    return _kept(x, mask).sum() / _tokens(mask)


def weighted_sum(x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Sum over all masked entries of the batch, each times its weight, a scalar."""
    return (_kept(x, mask) * weights).sum()


def token_weights(mask: Tensor, normalisation: str, longest: int) -> Tensor:
    """What each token counts in the loss of a gradient step, whose answers `mask` has: (answers, length).

    A loss of the step is the sum of its tokens' losses times these, so that the sums of its parts add up to it.

    Args:
        normalisation: "token": each token as much as each other (Yu et al. 2025, DAPO); "sequence": each answer as much
            as each other, its tokens by its length (Shao et al. 2024, GRPO); "constant": each token 1 / `longest`,
            and each answer 1 / their number (Liu et al. 2025, Dr. GRPO).
        longest: tokens that an answer may have.
    """
    if normalisation == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    if normalisation == "constant":
        return mask / (len(mask) * longest)
    return mask / _tokens(mask)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by n, not n - 1) over all masked entries, a scalar; 0 for one or none."""
    return masked_mean((_kept(x, mask) - masked_mean(x, mask)).square(), mask)


def whiten(advantages: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance over all masked entries of the batch; 0 at padding.

    Args:
        shift_mean: move the mean to 0; otherwise it stays where it was (Huang et al. 2024).
    """
    mean = masked_mean(advantages, mask)
    scaled = (_kept(advantages, mask) - mean) * (masked_variance(advantages, mask) + VARIANCE_FLOOR).rsqrt()
    return _kept(scaled if shift_mean else scaled + mean, mask)


# ---- log-probabilities, entropy, KL


def _over_temperature(logits: Tensor, temperature: float) -> Tensor:
    """In float32; float64 stays float64."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(token) at each position, (batch, length), float32.

    Of float32 logits at temperature 1 nothing the size of the vocabulary is kept for the backward pass but the logits
    themselves, and nothing of that size is made in it but their gradient.

    Args:
        logits: (batch, length, vocabulary); batch is at least 1. NaN logits at padding have a NaN gradient.
        tokens: (batch, length), each within the vocabulary, padding too.
    """
    return _LogProbability.apply(_over_temperature(logits, temperature), tokens.unsqueeze(-1)).squeeze(-1)


class _LogProbability(torch.autograd.Function):
    """d log p(token) / d logits = one_hot(token) - softmax(logits)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        normaliser = torch.stack([row.logsumexp(-1, keepdim=True) for row in logits])  # row by row: it copies
        ctx.save_for_backward(logits, tokens, normaliser)
        return logits.gather(-1, tokens) - normaliser

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, tokens, normaliser = ctx.saved_tensors
        gradient = (logits - normaliser).exp_().mul_(-upstream)
        return gradient.scatter_add_(-1, tokens, upstream), None


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the next token's distribution in nats, (batch, length); logits of -inf add nothing."""
    # unbind, not logits[i]: the gradient of each index would be as large as all the logits.
    rows = (_over_temperature(row, temperature).log_softmax(-1) for row in logits.unbind(0))
    return torch.stack([-(row.exp() * row.masked_fill(row == -torch.inf, 0.0)).sum(-1) for row in rows])


def kl_k1(logp: Tensor, ref_logp: Tensor, mask: Tensor | None = None) -> Tensor:
    """logp - ref_logp per token: unbiased for KL(policy || reference) on tokens the policy drew.

    Both estimators are of Schulman's note "Approximating KL Divergence" (2020). With `mask` the result and
    its gradient are 0 at padding.
    """
    difference = logp - ref_logp
    return difference if mask is None else _kept(difference, mask)


def kl_k3(logp: Tensor, ref_logp: Tensor, mask: Tensor | None = None) -> Tensor:
    """exp(-d) - 1 + d per token with d = logp - ref_logp: unbiased, and never negative."""
    difference = kl_k1(logp, ref_logp, mask)
    return torch.expm1(-difference) + difference


# ---- rewards and advantages


def score_clip(scores: Tensor, limit: float | None) -> Tensor:
    """Scores (batch,) held within ±limit; None leaves them."""
    return scores if limit is None else scores.clamp(-limit, limit)


def score_clip_fraction(scores: Tensor, limit: float | None) -> float:
    """Share of the scores (batch,) that `score_clip` changes: all these are learnt from as if they were equal."""
    return 0.0 if limit is None else float((scores.abs() > limit).float().mean())


def missing_end_penalty(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Scores (batch,) less `penalty` for each response that did not produce its end token (`ended` False)."""
    return torch.where(ended, scores, scores - penalty)


@torch.no_grad()
def token_rewards(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, kl_coefficient: float
) -> Tensor:
    """-kl_coefficient * k1 at each token, plus the response's score at its last token; 0 at padding.

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences". No gradient: rewards are data.

    Args:
        scores: (batch,), in the reward model's units. A row without any token gets no reward.
    """
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    rewards = -kl_coefficient * kl_k1(logp, ref_logp, mask)
    return rewards + _kept(scores.unsqueeze(1).expand_as(rewards), is_last)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantage + value), both 0 at padding and without gradient.

    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation":
    the sum over l of (gamma * lam)^l * delta_{t+l}, delta_t = r_t + gamma * V_{t+1} - V_t. A response ends at
    its last token: the value after it is 0.

    Args:
        values: V_t, the critic's estimate before token t is produced.
    """
    # Padding is to the right and 0 here, so the backward sum is still 0 where it meets the last token.
    rewards, values = _kept(rewards, mask), _kept(values, mask)
    advantages = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
    return advantages, advantages + values


def rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Each score less the mean of the other scores for the same prompt, (batch,).

    Ahmadian et al. 2024, "Back to Basics".

    Args:
        scores: (prompts * group_size,), the responses to one prompt side by side; group_size is at least 2.
    """
    if group_size < 2:
        raise ValueError("leave-one-out needs at least two responses a prompt")
    groups = scores.reshape(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def group_advantages(scores: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """Each score less the mean of its prompt's scores, over their standard deviation (n - 1) plus 1e-4, (batch,).

    Shao et al. 2024, "DeepSeekMath" (GRPO); the constant is TRL's, and keeps a group of equal scores at 0.

    Args:
        scores: as in `rloo_advantages`.
        scale: False leaves the division out: it makes much of prompts that are nearly all right or all wrong
            (Liu et al. 2025, "Understanding R1-Zero-Like Training", Dr. GRPO).
    """
    if group_size < 2:
        raise ValueError("a group has at least two responses")
    groups = scores.reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4) if scale else centred).flatten()


def alike(scores: Tensor, group_size: int) -> Tensor:
    """Which prompts' answers all got one score, as far as single precision can tell: (prompts,) of bool."""
    groups = scores.reshape(-1, group_size)
    return groups.amax(1) - groups.amin(1) <= SINGLE_PRECISION * groups.abs().amax(1)


# ---- losses


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    denominator: float | Tensor | None = None,
    *,
    weights: Tensor | None = None,
    clip_range_high: float | None = None,
    of_sequences: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of Schulman et al. 2017, "Proximal Policy Optimization", as a token mean to minimise.

    Args:
        denominator: the number of tokens of the whole update where this is one micro-batch of it (default: of
            this mask). The losses and measures of the micro-batches then add up to the whole batch's.
        weights: what each token counts in the loss (`token_weights`) instead; the measures stay token means.
        clip_range_high: how far above 1 the ratio counts, where that is not `clip_range` (Yu et al. 2025, DAPO).
        of_sequences: a token's ratio is its answer's, the geometric mean over the answer (Zheng et al. 2025, GSPO).

    Returns:
        The loss, and without gradient clip_fraction (share of tokens where the clip decides, which have no
        gradient), approx_kl (k3 of KL(old || new)) and mean_ratio.
    """
    logp, old_logp, advantages = _kept(logp, mask), _kept(old_logp, mask), _kept(advantages, mask)
    log_ratio = (logp - old_logp).clamp(max=MAX_LOG_RATIO)
    importance = log_ratio
    if of_sequences:
        importance = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)
    ratio = importance.exp()
    free = -advantages * ratio
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    count = _tokens(mask) if denominator is None else denominator
    worse = torch.maximum(free, clipped)  # 0 at padding: its advantage is 0
    loss = worse.sum() / count if weights is None else (worse * weights).sum()
    with torch.no_grad():
        measures = {
            "clip_fraction": (clipped > free).sum() / count,
            "approx_kl": kl_k3(torch.zeros_like(log_ratio), log_ratio).sum() / count,
            "mean_ratio": _kept(ratio, mask).sum() / count,
        }
    return loss, measures


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range_value: float | None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error as a token mean; the worse of it and that of a value held near the old one.

    The clip is of the reference code of Schulman et al. 2017. Units: returns squared.

    Args:
        clip_range_value: how far a value may move from its old one, in units of returns; None: no clip.
        denominator: as in `policy_loss`.

    Returns:
        The loss, and without gradient clip_fraction (share of tokens where the clip decides).
    """
    values, old_values, returns = _kept(values, mask), _kept(old_values, mask), _kept(returns, mask)
    count = _tokens(mask) if denominator is None else denominator
    free = worse = (values - returns).square()
    if clip_range_value is not None:
        near = old_values + (values - old_values).clamp(-clip_range_value, clip_range_value)
        worse = torch.maximum(free, (near - returns).square())
    # At padding all three are 0, so the sums need no mask.
    return 0.5 * worse.sum() / count, {"clip_fraction": (worse > free).sum() / count}


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    """1 - var(returns - values) / var(returns): 1 is perfect, 0 as a constant; None for equal returns."""
    variance = masked_variance(returns, mask).item()
    if variance == 0.0:
        return None
    return 1.0 - masked_variance(_kept(returns, mask) - _kept(values, mask), mask).item() / variance


# ---- running states


@dataclass
class FixedKL:
    """A KL coefficient that stays; it takes the place of `AdaptiveKL`."""

    coefficient: float

    def update(self, kl: float, steps: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


@dataclass
class AdaptiveKL(FixedKL):
    """A KL coefficient that moves the KL towards `target` (Ziegler et al. 2019).

    target: nats a response (or a token: the unit of the `kl` it is given). horizon: in the unit of `steps`.
    """

    target: float
    horizon: float

    def update(self, kl: float, steps: int) -> None:
        """Take in the mean KL of `steps` new responses."""
        if math.isnan(kl):
            raise ValueError("the KL is not a number")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        factor = 1 + error * steps / self.horizon
        if factor <= 0:
            raise ValueError(f"the KL horizon {self.horizon} is too short for updates of {steps}")
        self.coefficient *= factor


@dataclass
class RunningMoments:
    """Count, mean and population variance of all scores so far (Chan, Golub & LeVeque 1979: batches merge)."""

    count: int = 0
    mean: float = 0.0
    var: float = 0.0

    def update(self, scores: Tensor) -> None:
        scores = scores.detach().cpu().double().flatten()  # not every accelerator has float64
        if not scores.isfinite().all():
            raise ValueError("a score is not finite")  # it would spoil every later score
        if not (new := scores.numel()):
            return
        shift, total = scores.mean().item() - self.mean, self.count + new
        squares = self.var * self.count + scores.var(correction=0).item() * new
        self.var = (squares + shift**2 * self.count * new / total) / total
        self.mean += shift * new / total
        self.count = total

    @property
    def spread(self) -> float | None:
        """Standard deviation of the scores; None where they have not varied.

        What counts as varying is a share of their level, not a number: a reward of 1e-6 ± 1e-7 is as good as one of
        10 ± 1, and what a model in single precision makes of equal answers differs in the seventh digit.
        """
        spread = math.sqrt(self.var)
        return spread if spread > SINGLE_PRECISION * abs(self.mean) else None

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "var": self.var}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.var = state["count"], state["mean"], state["var"]


def normalise(scores: Tensor, moments: RunningMoments) -> Tensor:
    """Scores (batch,) less their running mean, over their running standard deviation, in float64.

    Neither a constant added to all scores nor a positive factor changes the result. Where the scores so far have not
    varied nothing is scaled: it would be rounding that is blown up.
    """
    return (scores.double() - moments.mean) / (moments.spread or 1.0)


def change_of_units(before: RunningMoments, now: RunningMoments) -> tuple[float, float]:
    """(scale, shift) that turn a value normalised by moments of before into the same value normalised by those of now.

    van Hasselt et al. 2016, "Learning values across many orders of magnitude" (Pop-Art), equation 3: with both in the
    value function's last layer it goes on predicting what it has predicted, in the new units. (1, 0) where either
    have not varied.
    """
    if before.spread is None or now.spread is None:
        return 1.0, 0.0
    return before.spread / now.spread, (before.mean - now.mean) / now.spread
