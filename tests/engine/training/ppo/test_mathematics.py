"""PPO's formulas: by hand, against a loop-written reference, and by the properties the papers prove."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from medicalgpt_cli.engine.training.ppo import mathematics as m
from tests.engine.training.ppo import reference

NAN, INF = math.nan, math.inf
POISON = [NAN, INF, -INF, 0.0, 7.0]
NUMBERS = st.integers(-3000, 3000).map(lambda x: x / 1000)
NEGATIVE = st.integers(-4000, -1).map(lambda x: x / 1000)


def tensor(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(actual: Tensor | float, expected: object, tolerance: float = 1e-9) -> None:
    """NaN equals nothing here, so it cannot pass."""
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


@dataclass
class Batch:
    """What an update works on, right-padded with poison."""

    mask: list[list[bool]]
    logp: list[list[float]]
    old: list[list[float]]
    ref: list[list[float]]
    values: list[list[float]]
    old_values: list[list[float]]
    rewards: list[list[float]]
    advantages: list[list[float]]
    scores: list[float]

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: torch.tensor(rows, dtype=torch.bool if name == "mask" else torch.float64)
            for name, rows in vars(self).items()
        }


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 2))

    def rows(numbers: st.SearchStrategy[float]) -> list[list[float]]:
        return [
            [draw(numbers if at < length else st.sampled_from(POISON)) for at in range(width)]
            for length in lengths
        ]

    return Batch(
        mask=[[at < length for at in range(width)] for length in lengths],
        logp=rows(NEGATIVE),
        old=rows(NEGATIVE),
        ref=rows(NEGATIVE),
        values=rows(NUMBERS),
        old_values=rows(NUMBERS),
        rewards=rows(NUMBERS),
        advantages=rows(NUMBERS),
        # A response without a token has no score worth anything.
        scores=[draw(NUMBERS if length else st.sampled_from(POISON)) for length in lengths],
    )


def random_batch(seed: int = 0, lengths: tuple[int, ...] = (4, 1, 3, 0, 5)) -> dict[str, Tensor]:
    """A batch off every kink: no ratio near a clip, no tie of two errors."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=g)

    old = -normal(*shape).abs() - 0.1
    return {
        "mask": torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1),
        "logp": old + 0.3 * normal(*shape),
        "old": old,
        "ref": old + 0.2 * normal(*shape),
        "values": normal(*shape),
        "old_values": normal(*shape),
        "rewards": normal(*shape),
        "advantages": normal(*shape),
        "scores": normal(len(lengths)),
    }


def policy(b: dict[str, Tensor], denominator: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return m.policy_loss(b["logp"], b["old"], b["advantages"], b["mask"], 0.2, denominator)


def value(b: dict[str, Tensor], denominator: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return m.value_loss(b["values"], b["old_values"], b["rewards"], b["mask"], 0.5, denominator)


LOSSES = pytest.mark.parametrize(("loss", "name"), [(policy, "logp"), (value, "values")])
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def gradient(loss: Loss, b: dict[str, Tensor], name: str, denominator: float | None = None) -> Tensor:
    leaf = b[name].clone().requires_grad_()
    loss(b | {name: leaf}, denominator)[0].backward()
    return leaf.grad


# ---- means over tokens


def test_means_by_hand():
    x = tensor([[1.0, 2.0, NAN], [6.0, INF, -INF]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    close(m.masked_mean(x, mask), 3.0)
    close(m.masked_variance(x, mask), 14 / 3)  # (4 + 1 + 9) / 3, not / 2
    root = math.sqrt(14 / 3)
    close(m.whiten(x, mask), [[-2 / root, -1 / root, 0.0], [3 / root, 0.0, 0.0]], 1e-8)
    close(m.whiten(x, mask, shift_mean=False), [[3 - 2 / root, 3 - 1 / root, 0], [3 + 3 / root, 0, 0]], 1e-8)


def test_means_of_nothing_of_one_and_of_equals_are_finite():
    x = tensor([[5.0, NAN]])
    nothing, one = torch.tensor([[False, False]]), torch.tensor([[True, False]])
    close(m.masked_mean(x, nothing), 0.0)
    close(m.masked_variance(x, nothing), 0.0)
    close(m.whiten(x, nothing), [[0.0, 0.0]])
    close(m.masked_variance(x, one), 0.0)
    close(m.whiten(x, one), [[0.0, 0.0]])
    close(m.whiten(x, one, shift_mean=False), [[5.0, 0.0]])
    equal = torch.full((2, 3), 0.1)
    close(m.whiten(equal, torch.ones(2, 3, dtype=torch.bool)), torch.zeros(2, 3), 1e-3)


@given(batches(), st.booleans())
def test_means_equal_the_reference(batch, shift_mean):
    x, mask = batch.tensors()["advantages"], batch.tensors()["mask"]
    kept = reference.kept(batch.advantages, batch.mask)
    close(m.masked_mean(x, mask), reference.mean(kept))
    close(m.masked_variance(x, mask), reference.variance(kept))
    close(m.whiten(x, mask, shift_mean), reference.whiten(batch.advantages, batch.mask, shift_mean), 1e-7)


def test_whitened_entries_have_mean_0_and_variance_1():
    b = random_batch()
    white = m.whiten(b["advantages"] * 7 + 3, b["mask"])
    close(m.masked_mean(white, b["mask"]), 0.0)
    close(m.masked_variance(white, b["mask"]), 1.0, 1e-7)


# ---- log-probabilities, entropy


def test_log_probabilities_and_entropy_by_hand():
    logits = torch.tensor([[[0.0, math.log(2), math.log(5)]] * 3])
    logp = m.log_probabilities(logits, torch.tensor([[0, 1, 2]]))
    assert logp.dtype == torch.float32
    close(logp, [[math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)]], 1e-6)
    root = 1 + math.sqrt(2) + math.sqrt(5)
    warm = m.log_probabilities(logits, torch.tensor([[0, 1, 2]]), temperature=2.0)
    close(warm, [[math.log(1 / root), math.log(math.sqrt(2) / root), math.log(math.sqrt(5) / root)]], 1e-6)

    close(m.entropy(torch.zeros(1, 2, 4)), [[math.log(4)] * 2], 1e-6)
    halves = torch.tensor([[[math.log(2), 0.0, 0.0, -INF]]], requires_grad=True)
    entropy = m.entropy(halves)
    close(entropy, [[1.5 * math.log(2)]], 1e-6)
    entropy.sum().backward()
    assert halves.grad.isfinite().all()


@given(
    st.lists(st.lists(NUMBERS.map(lambda x: 5 * x), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([0.5, 1.0, 1.7]),
)
def test_log_probabilities_and_entropy_equal_the_reference(rows, temperature):
    logits = tensor([rows, rows[::-1]])
    for token in range(3):
        actual = m.log_probabilities(logits, torch.full((2, len(rows)), token), temperature)
        expected = [math.log(reference.probabilities(row, temperature)[token]) for row in rows]
        close(actual, [expected, expected[::-1]])
    expected = [reference.entropy(row, temperature) for row in rows]
    close(m.entropy(logits, temperature), [expected, expected[::-1]])


def test_log_probabilities_are_computed_in_float32_and_do_not_overflow():
    g = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(2, 3, 50, generator=g)).bfloat16()
    tokens = torch.randint(50, (2, 3), generator=g)
    exact = m.log_probabilities(logits.double(), tokens)
    logp = m.log_probabilities(logits, tokens)
    assert logp.dtype == torch.float32
    assert exact.dtype == torch.float64
    close(logp, exact, 1e-5)
    close(m.entropy(logits), m.entropy(logits.double()), 1e-5)
    close(m.log_probabilities(torch.tensor([[[1e4, -1e4]]]), torch.tensor([[1]])), [[-2e4]])


def test_gradient_of_log_probabilities_is_that_of_log_softmax():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=g, requires_grad=True)
    tokens = torch.randint(7, (2, 3), generator=g)
    weights = torch.randn(2, 3, dtype=torch.float64, generator=g)
    (actual,) = torch.autograd.grad((weights * m.log_probabilities(logits, tokens, 1.3)).sum(), logits)
    one_hot = torch.nn.functional.one_hot(tokens, 7)
    close(actual, weights.unsqueeze(-1) * (one_hot - (logits / 1.3).softmax(-1)) / 1.3)


def test_log_probabilities_keep_no_second_copy_of_the_logits():
    logits = torch.randn(2, 3, 1000, requires_grad=True)
    kept = 0

    def count(saved: Tensor) -> Tensor:
        nonlocal kept
        if saved.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
            kept += saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        m.log_probabilities(logits, torch.zeros(2, 3, dtype=torch.long))
    assert kept < 100


# ---- KL


def test_kl_estimators_by_hand():
    logp, ref = tensor([[math.log(0.5)]]), tensor([[math.log(0.25)]])
    close(m.kl_k1(logp, ref), [[0.69314718056]])
    close(m.kl_k3(logp, ref), [[0.19314718056]])  # 1/2 - 1 + ln 2
    close(m.kl_k3(ref, logp), [[0.30685281944]])  # 2 - 1 - ln 2


@pytest.mark.parametrize("estimator", [m.kl_k1, m.kl_k3])
def test_kl_of_padding_is_0_with_a_gradient_of_0(estimator):
    logp = tensor([[-1.0, NAN, -INF]]).requires_grad_()
    mask = torch.tensor([[True, False, False]])
    kl = estimator(logp, tensor([[-2.0, INF, NAN]]), mask)
    close(kl, [[estimator(tensor(-1.0), tensor(-2.0)).item(), 0.0, 0.0]])
    kl.sum().backward()
    assert logp.grad[0, 0] != 0
    close(logp.grad[0, 1:], [0.0, 0.0])


@given(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32))
def test_k3_is_never_negative(logp, ref):
    a, b = torch.full((16,), logp), torch.full((16,), ref)  # wide enough for the vectorised exp
    assert (m.kl_k3(a, b) >= 0).all()
    close(m.kl_k3(a.double(), b.double()), [reference.k3(logp, ref)] * 16, 1e-7)


def test_k3_of_near_policies_keeps_its_digits():
    close(m.kl_k3(torch.tensor([1e-4]), torch.tensor([0.0])) * 1e8, [0.5], 1e-2)


@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_have_the_true_kl_as_their_mean(seed):
    """Over every token of a small vocabulary, each with the weight of its probability under the policy."""
    g = torch.Generator().manual_seed(seed)
    policy_logits, ref_logits = torch.randn(2, 1, 6, dtype=torch.float64, generator=g)
    tokens = torch.arange(6).unsqueeze(0)
    logp = m.log_probabilities(policy_logits.expand(1, 6, 6), tokens)
    ref = m.log_probabilities(ref_logits.expand(1, 6, 6), tokens)
    p = reference.probabilities(policy_logits[0].tolist())
    q = reference.probabilities(ref_logits[0].tolist())
    true = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    for estimator in (m.kl_k1, m.kl_k3):
        close((logp.exp() * estimator(logp, ref)).sum(), true)


# ---- rewards


def test_scores_are_clipped_and_missing_ends_are_punished():
    scores, ended = tensor([-9.0, 0.5, 9.0]), torch.tensor([True, False, False])
    close(m.score_clip(scores, 5.0), [-5.0, 0.5, 5.0])
    close(m.score_clip(scores, None), [-9.0, 0.5, 9.0])
    close(m.missing_end_penalty(scores, ended, 2.0), [-9.0, -1.5, 7.0])


def test_token_rewards_by_hand():
    logp = tensor([[-1.0, -2.0, NAN], [-3.0, INF, 0.0], [NAN, NAN, NAN]])
    ref = tensor([[-1.5, -1.0, 0.0], [-3.0, NAN, 0.0], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    rewards = m.token_rewards(tensor([10.0, 20.0, NAN]), logp, ref, mask, 0.1)
    close(rewards, [[-0.05, 0.1 + 10.0, 0.0], [20.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


@given(batches(), st.sampled_from([0.0, 0.05, 1.0]))
def test_token_rewards_equal_the_reference(batch, coefficient):
    b = batch.tensors()
    expected = reference.token_rewards(batch.scores, batch.logp, batch.ref, batch.mask, coefficient)
    close(m.token_rewards(b["scores"], b["logp"], b["ref"], b["mask"], coefficient), expected)


def test_leave_one_out_by_hand():
    # The others' means: (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2; and for equal scores nothing.
    scores = tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    close(m.rloo_advantages(scores, 3), [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="two"):
        m.rloo_advantages(scores, 1)


def test_group_advantages_by_hand():
    scores = tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])  # deviations -2, -1, 3: std sqrt(14 / 2)
    close(m.group_advantages(scores, 3), [-0.7559003, -0.3779502, 1.1338505, 0.0, 0.0, 0.0], 1e-6)
    with pytest.raises(ValueError, match="two responses"):
        m.group_advantages(scores, 1)


# ---- advantages


def test_gae_by_hand():
    rewards = tensor([[0.0, 1.0, NAN], [2.0, INF, INF]])
    values = tensor([[0.5, 0.6, NAN], [0.5, NAN, -INF]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    advantages, returns = m.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    # delta_1 = 1 - 0.6 = 0.4; delta_0 = 0 + 0.9 * 0.6 - 0.5 = 0.04; A_0 = 0.04 + 0.72 * 0.4
    close(advantages, [[0.328, 0.4, 0.0], [1.5, 0.0, 0.0]])
    close(returns, [[0.828, 1.0, 0.0], [2.0, 0.0, 0.0]])


@given(batches(), st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_equals_the_textbook_double_sum(batch, gamma, lam):
    b = batch.tensors()
    expected = reference.gae(batch.rewards, batch.values, batch.mask, gamma, lam)
    for actual, textbook in zip(
        m.gae(b["rewards"], b["values"], b["mask"], gamma, lam), expected, strict=True
    ):
        close(actual, textbook)


@given(batches(), st.sampled_from([0.5, 0.9, 1.0]))
def test_gae_at_lambda_1_is_monte_carlo_and_at_0_one_step(batch, gamma):
    b = batch.tensors()
    monte_carlo = m.gae(b["rewards"], b["values"], b["mask"], gamma, 1.0)
    one_step = m.gae(b["rewards"], b["values"], b["mask"], gamma, 0.0)
    for i, keep in enumerate(batch.mask):
        length = sum(keep)
        rewards, values = batch.rewards[i][:length], [*batch.values[i][:length], 0.0]
        for t in range(length):
            ahead = math.fsum(gamma**k * r for k, r in enumerate(rewards[t:]))
            close(monte_carlo[0][i, t], ahead - values[t])
            close(monte_carlo[1][i, t], ahead)
            close(one_step[0][i, t], rewards[t] + gamma * values[t + 1] - values[t])


def test_gae_is_data_without_gradient_and_takes_no_columns_at_all():
    b = random_batch()
    values = b["values"].requires_grad_()
    assert not any(result.requires_grad for result in m.gae(b["rewards"], values, b["mask"], 1.0, 0.95))
    assert not m.token_rewards(b["scores"], values, b["ref"], b["mask"], 0.1).requires_grad
    empty = torch.zeros(2, 0)
    assert m.gae(empty, empty, empty.bool(), 1.0, 0.95)[0].shape == (2, 0)


# ---- losses


def test_policy_loss_by_hand():
    ratios = [1.5, 0.5, 1.5, 0.5]
    logp = tensor([[math.log(r) - 1.0 for r in ratios] + [NAN]])
    old = tensor([[-1.0] * 4 + [INF]])
    advantages = tensor([[1.0, -1.0, -2.0, 1.0, NAN]])
    mask = torch.tensor([[True] * 4 + [False]])
    loss, measures = m.policy_loss(logp, old, advantages, mask, 0.2)
    # Held at 1.2: -1.2; held at 0.8: 0.8; the worse, free one: 3.0; and likewise -0.5.
    close(loss, (-1.2 + 0.8 + 3.0 - 0.5) / 4)
    close(measures["clip_fraction"], 0.5)
    close(measures["mean_ratio"], 1.0)
    close(measures["approx_kl"], (2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))) / 4)
    close(m.policy_loss(logp, old, advantages, mask, 0.2, denominator=8)[0], 2.1 / 8)


@given(batches(), st.sampled_from([0.1, 0.2, 0.5]))
def test_policy_loss_equals_the_reference(batch, clip):
    b = batch.tensors()
    loss, measures = m.policy_loss(b["logp"], b["old"], b["advantages"], b["mask"], clip)
    expected = reference.policy_loss(batch.logp, batch.old, batch.advantages, batch.mask, clip)
    assert {"loss", *measures} == set(expected)
    for name, actual in {"loss": loss, **measures}.items():
        close(actual, expected[name], 1e-6 if name == "clip_fraction" else 1e-9)


def test_value_loss_by_hand():
    values, old = tensor([[1.0, 2.0, 0.0, NAN]]), tensor([[0.5, 1.9, 1.0, INF]])
    returns, mask = tensor([[2.0, 1.0, 1.5, NAN]]), torch.tensor([[True, True, True, False]])
    loss, measures = m.value_loss(values, old, returns, mask, 0.2)
    # Held at 0.7: 1.3^2, worse than 1; within reach: 1; held at 0.8: 0.7^2, better than 1.5^2.
    close(loss, (1.69 + 1.0 + 2.25) / 3 / 2)
    close(measures["clip_fraction"], 1 / 3, 1e-6)  # a share of counts is float32
    loss, measures = m.value_loss(values, old, returns, mask, None)
    close(loss, (1.0 + 1.0 + 2.25) / 3 / 2)
    close(measures["clip_fraction"], 0.0)
    close(m.value_loss(values, old, returns, mask, 0.2, denominator=10)[0], 4.94 / 10 / 2)


@given(batches(), st.sampled_from([None, 0.2, 1.0]))
def test_value_loss_equals_the_reference(batch, clip):
    b = batch.tensors()
    loss, measures = m.value_loss(b["values"], b["old_values"], b["rewards"], b["mask"], clip)
    expected = reference.value_loss(batch.values, batch.old_values, batch.rewards, batch.mask, clip)
    close(loss, expected[0])
    close(measures["clip_fraction"], expected[1], 1e-6)


@LOSSES
@pytest.mark.parametrize("seed", range(6))
def test_gradients_equal_central_differences(loss, name, seed):
    b, step = random_batch(seed), 1e-6
    actual = gradient(loss, b, name)
    assert 0 < loss(b)[1]["clip_fraction"] < 1  # both branches are tried
    for i, j in b["mask"].nonzero().tolist():
        moved = torch.zeros_like(b[name])
        moved[i, j] = step
        above, below = loss(b | {name: b[name] + moved})[0], loss(b | {name: b[name] - moved})[0]
        close(actual[i, j], (above - below) / (2 * step), 1e-7)


@LOSSES
@pytest.mark.parametrize("poison", POISON)
def test_padding_changes_neither_losses_nor_gradients(loss, name, poison):
    b = random_batch()
    padding = ~b["mask"]
    wide = {"mask": torch.nn.functional.pad(b["mask"], (0, 3))}
    for other, x in b.items():
        if other not in ("mask", "scores"):
            wide[other] = torch.nn.functional.pad(x.masked_fill(padding, poison), (0, 3), value=poison)
    plain = {other: x if x.ndim < 2 else x.masked_fill(padding, 0) for other, x in b.items()}
    (first, measures), (second, again) = loss(plain), loss(wide)
    assert first.item() != 0
    close(second, first.detach())
    for measure in measures:
        close(again[measure], measures[measure])
    wide_gradient = gradient(loss, wide, name)
    close(wide_gradient[:, :-3], gradient(loss, plain, name))
    assert (wide_gradient[~wide["mask"]] == 0).all()


@pytest.mark.parametrize("poison", POISON)
def test_padding_changes_no_reward_advantage_or_measure(poison):
    b = random_batch()

    def all_of(b: dict[str, Tensor]) -> list[Tensor | float]:
        rewards = m.token_rewards(b["scores"], b["logp"], b["ref"], b["mask"], 0.1)
        return [
            rewards,
            *m.gae(rewards, b["values"], b["mask"], 0.99, 0.95),
            m.whiten(b["advantages"], b["mask"]),
            m.masked_mean(b["values"], b["mask"]),
            m.masked_variance(b["values"], b["mask"]),
            m.explained_variance(b["values"], b["rewards"], b["mask"]),
        ]

    wide = {
        name: x if x.ndim < 2 else torch.nn.functional.pad(x, (0, 2), value=0 if name == "mask" else poison)
        for name, x in b.items()
    }
    for name, x in wide.items():
        if x.is_floating_point() and x.ndim == 2:
            wide[name] = x.masked_fill(~wide["mask"], poison)
    for plain, padded in zip(all_of(b), all_of(wide), strict=True):
        if isinstance(plain, Tensor) and plain.ndim == 2:
            assert (padded[:, -2:] == 0).all()
            padded = padded[:, :-2]
        close(padded, plain)


@LOSSES
def test_the_order_of_rows_does_not_matter(loss, name):
    b = random_batch()
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {other: x[order] for other, x in b.items()}
    close(loss(shuffled)[0], loss(b)[0])
    close(gradient(loss, shuffled, name), gradient(loss, b, name)[order])
    for actual, plain in zip(
        m.gae(shuffled["rewards"], shuffled["values"], shuffled["mask"], 0.9, 0.8),
        m.gae(b["rewards"], b["values"], b["mask"], 0.9, 0.8),
        strict=True,
    ):
        close(actual, plain[order])


@LOSSES
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_micro_batches_add_up_to_the_whole_batch(loss, name, sizes):
    b = random_batch()
    tokens = b["mask"].sum().item()
    parts = [
        dict(zip(b, split, strict=True))
        for split in zip(*(x.split(list(sizes)) for x in b.values()), strict=True)
    ]
    whole, measures = loss(b)
    results = [loss(part, tokens) for part in parts]
    close(sum(result[0] for result in results), whole)
    for measure, expected in measures.items():
        close(sum(result[1][measure] for result in results), expected)
    close(torch.cat([gradient(loss, part, name, tokens) for part in parts]), gradient(loss, b, name))


@LOSSES
def test_a_batch_without_a_token_costs_nothing(loss, name):
    b = random_batch()
    b["mask"] = torch.zeros_like(b["mask"])
    close(loss(b)[0], 0.0)
    close(gradient(loss, b, name), torch.zeros_like(b[name]))


def test_the_first_step_is_reinforce_with_a_baseline():
    """While the policy is the old one, the gradient is that of -mean(A log p), A the return less the value."""
    g = torch.Generator().manual_seed(0)
    b = random_batch()
    logits = torch.randn(*b["mask"].shape, 7, dtype=torch.float64, generator=g, requires_grad=True)
    tokens = torch.randint(7, b["mask"].shape, generator=g)
    advantages, _ = m.gae(b["rewards"], b["values"], b["mask"], 1.0, 1.0)
    logp = m.log_probabilities(logits, tokens)
    loss, measures = m.policy_loss(logp, logp.detach(), advantages, b["mask"], 0.2)
    (actual,) = torch.autograd.grad(loss, logits)
    close(measures["mean_ratio"], 1.0)
    close(measures["clip_fraction"], 0.0)
    close(measures["approx_kl"], 0.0)

    expected, count = 0.0, b["mask"].sum()
    for i, length in enumerate(b["mask"].sum(1).tolist()):
        for t in range(length):
            baseline = b["values"][i, t]
            log_p = logits[i, t].log_softmax(-1)[tokens[i, t]]
            expected = expected - (b["rewards"][i, t:length].sum() - baseline) * log_p / count
    close(actual, torch.autograd.grad(expected, logits)[0])


def test_clipped_tokens_have_no_gradient():
    old, mask = tensor([[-1.0, -1.0, -1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    logp = (old + tensor([[0.5, -0.5, 0.5, -0.5]])).requires_grad_()
    m.policy_loss(logp, old, tensor([[1.0, -1.0, -1.0, 1.0]]), mask, 0.2)[0].backward()
    close(logp.grad, [[0.0, 0.0, math.exp(0.5) / 4, -math.exp(-0.5) / 4]])


def test_a_ratio_past_float32_gives_a_finite_loss_and_gradient():
    logp = torch.tensor([[-1.0, -1.0, -INF]], requires_grad=True)
    old, mask = torch.tensor([[-500.0, -500.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss, measures = m.policy_loss(logp, old, torch.tensor([[1.0, -1.0, 1.0]]), mask, 0.2)
    loss.backward()
    assert loss.isfinite()
    assert measures["mean_ratio"].isfinite()
    assert logp.grad.isfinite().all()


# ---- explained variance


def test_explained_variance_by_hand():
    returns, mask = tensor([[1.0, 2.0, 3.0, NAN]]), torch.tensor([[True, True, True, False]])
    close(m.explained_variance(returns, returns, mask), 1.0)
    close(m.explained_variance(returns + 5.0, returns, mask), 1.0)  # a constant error has no variance
    close(m.explained_variance(torch.zeros(1, 4), returns, mask), 0.0)
    close(m.explained_variance(tensor([[3.0, 2.0, 1.0, NAN]]), returns, mask), -3.0)  # errors -2, 0, 2
    assert m.explained_variance(returns, torch.ones(1, 4), mask) is None


@given(batches())
def test_explained_variance_equals_the_reference(batch):
    values, returns = reference.kept(batch.values, batch.mask), reference.kept(batch.rewards, batch.mask)
    assume(reference.variance(returns) > 1e-9)
    errors = [r - v for r, v in zip(returns, values, strict=True)]
    b = batch.tensors()
    close(
        m.explained_variance(b["values"], b["rewards"], b["mask"]),
        1 - reference.variance(errors) / reference.variance(returns),
        1e-6,
    )


# ---- running states


def test_adaptive_kl_by_hand():
    control = m.AdaptiveKL(0.2, target=6.0, horizon=1000)
    control.update(6.6, 100)  # error 0.1: a hundredth more
    close(control.coefficient, 0.2 * 1.01)
    control.update(60.0, 100)  # held at 0.2
    close(control.coefficient, 0.2 * 1.01 * 1.02)
    control.update(0.0, 100)  # held at -0.2
    close(control.coefficient, 0.2 * 1.01 * 1.02 * 0.98)
    control.update(6.0, 100)
    close(control.coefficient, 0.2 * 1.01 * 1.02 * 0.98)

    resumed = m.AdaptiveKL(0.2, target=6.0, horizon=1000)
    resumed.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for _ in range(3):
        resumed.update(6.3, 64)
        control.update(6.3, 64)
    assert resumed == control


def test_adaptive_kl_refuses_what_would_spoil_the_coefficient():
    control = m.AdaptiveKL(0.2, target=6.0, horizon=10)
    with pytest.raises(ValueError, match="not a number"):
        control.update(NAN, 1)
    with pytest.raises(ValueError, match="horizon"):
        control.update(0.0, 50)
    assert control.coefficient == 0.2


def test_fixed_kl_stays():
    control = m.FixedKL(0.2)
    control.update(60.0, 1000)
    assert control.coefficient == 0.2
    again = m.FixedKL(0.7)
    again.load_state_dict(control.state_dict())
    assert again == control


def test_running_moments_by_hand():
    moments = m.RunningMoments()
    moments.update(tensor([]))
    assert moments == m.RunningMoments()
    moments.update(tensor([1.0, 3.0]))
    assert (moments.count, moments.mean, moments.var) == (2, 2.0, 1.0)
    moments.update(tensor([8.0]))  # 1, 3, 8: mean 4, variance (9 + 1 + 16) / 3
    close([moments.count, moments.mean, moments.var], [3, 4.0, 26 / 3])
    close(m.normalise(tensor([4.0, 10.0]), moments), [0.0, 6 / math.sqrt(26 / 3)])
    with pytest.raises(ValueError, match="finite"):
        moments.update(tensor([NAN]))
    assert moments.count == 3


@given(st.lists(st.lists(NUMBERS, max_size=6), max_size=5), st.sampled_from([0.0, 1e6]))
def test_running_moments_of_batches_are_those_of_all(parts, level):
    moments, everything = m.RunningMoments(), [x + level for part in parts for x in part]
    for part in parts:
        moments.update(tensor([x + level for x in part]))
    assert moments.count == len(everything)
    close(moments.mean, reference.mean(everything))
    close(moments.var, reference.variance(everything), 1e-7)


def test_running_moments_resume_exactly():
    g = torch.Generator().manual_seed(0)
    moments, resumed = m.RunningMoments(), m.RunningMoments()
    moments.update(torch.randn(7, generator=g) * 3 + 1)
    resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    assert resumed == moments
    more = torch.randn(5, generator=g)
    moments.update(more)
    resumed.update(more)
    assert resumed == moments


def test_scores_that_never_varied_are_not_scaled():
    moments = m.RunningMoments()
    close(m.normalise(tensor([2.0]), moments), [2.0])
    for _ in range(3):
        moments.update(tensor([0.1, 0.1 + 1e-8]))  # what single precision makes of equal numbers
    assert moments.spread is None
    close(m.normalise(tensor([0.1, 1.1]), moments), [0.0, 1.0], 1e-5)


@given(
    st.lists(NUMBERS, min_size=2, max_size=8).filter(lambda found: max(found) - min(found) > 0.1),
    st.sampled_from([1e-9, 0.3, 1e6]),
    st.sampled_from([-50.0, 0.0, 20.0]),
)
def test_neither_a_constant_nor_a_factor_of_the_scores_matters(scores, factor, constant):
    plain, moved = m.RunningMoments(), m.RunningMoments()
    other = [factor * (score + constant) for score in scores]
    plain.update(tensor(scores))
    moved.update(tensor(other))
    close(m.normalise(tensor(other), moved), m.normalise(tensor(scores), plain), 1e-9)


def test_a_value_keeps_its_meaning_when_the_moments_move():
    before, now = m.RunningMoments(4, 20.0, 4.0), m.RunningMoments(8, 23.0, 9.0)
    scale, shift = m.change_of_units(before, now)
    # A score of 26 was (26 - 20) / 2 = 3 and is (26 - 23) / 3 = 1.
    close([scale * 3 + shift], [1.0])
    assert m.change_of_units(m.RunningMoments(1, 5.0, 0.0), now) == (1.0, 0.0)


def test_share_of_clipped_scores():
    scores = tensor([-9.0, 5.0, -5.0, 5.1])
    assert m.score_clip_fraction(scores, 5.0) == 0.5
    assert m.score_clip_fraction(scores, None) == 0.0
