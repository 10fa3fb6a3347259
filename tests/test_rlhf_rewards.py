"""KL estimators, token rewards and the β controller against published numbers and plain sums."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rlhf_toys import EXTRA, LENGTHS, MASK_TYPES, RUBBISH, SEEDS, mask_of, numbers, spoil, tokens

from tasks.rlhf.rewards import adaptive_beta, k1, k2, k3, penalise_unfinished, token_rewards


def test_estimators_at_known_ratios() -> None:
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-2.0, -1.0, -0.5]])
    assert k1(logprobs, ref_logprobs).tolist() == [[1.0, -1.0, 0.0]]
    assert k2(logprobs, ref_logprobs).tolist() == [[0.5, 0.5, 0.0]]
    expected = [math.exp(-1), math.e - 2, 0.0]  # e^logr − 1 − logr at logr = −1, 1, 0
    assert k3(logprobs, ref_logprobs).squeeze().tolist() == pytest.approx(expected, abs=1e-6)


def test_k1_and_k3_are_the_divergence_in_expectation() -> None:
    """Exactly, by summing over all outcomes of a policy rather than by sampling it."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    divergence = (policy * (policy / reference).log()).sum().item()
    log, ref_log = policy.log(), reference.log()
    assert (policy * k1(log, ref_log)).sum().item() == pytest.approx(divergence, abs=1e-6)
    assert (policy * k3(log, ref_log)).sum().item() == pytest.approx(divergence, abs=1e-6)
    close = policy + torch.tensor([0.01, 0.0, -0.01])
    divergence = (policy * (policy / close).log()).sum().item()
    assert (policy * k2(log, close.log())).sum().item() == pytest.approx(divergence, rel=0.05)


@given(LENGTHS, SEEDS)
def test_estimators_of_a_policy_that_is_its_reference_are_zero(lengths: list[int], seed: int) -> None:
    (logprobs,) = numbers(seed, lengths, 1)
    for estimate in (k1, k2, k3):
        assert estimate(logprobs, logprobs.clone()).eq(0).all()


@given(LENGTHS, SEEDS)
def test_k2_and_k3_are_never_negative(lengths: list[int], seed: int) -> None:
    logprobs, ref_logprobs = numbers(seed, lengths, 2)
    assert k2(logprobs, ref_logprobs).min() >= 0
    assert k3(logprobs, ref_logprobs).min() >= 0


def test_k3_keeps_its_digits_near_the_reference() -> None:
    """A policy that moved by 1e-3 a token is 5e-7 nats away: e^x − 1 taken literally would lose half of it."""
    moved = torch.full((1, 1), 1e-3)
    assert k3(torch.zeros(1, 1), moved).item() == pytest.approx(5.0017e-7, rel=1e-3)


def test_the_score_goes_to_the_last_token_and_the_penalty_to_all() -> None:
    ref_logprobs = torch.zeros(1, 3)
    rewards = token_rewards(torch.tensor([1.0]), ref_logprobs - 0.1, ref_logprobs, torch.ones(1, 3), beta=0.5)
    assert rewards.squeeze().tolist() == pytest.approx([0.05, 0.05, 1.05])


@given(LENGTHS, SEEDS, EXTRA, RUBBISH, MASK_TYPES, st.floats(0, 2))
def test_token_rewards_by_hand(
    lengths: list[int], seed: int, extra: int, rubbish: float, dtype: torch.dtype, beta: float
) -> None:
    mask = mask_of(lengths, dtype)
    logprobs, ref_logprobs = numbers(seed, lengths, 2)
    scores = torch.arange(1.0, 1.0 + len(lengths))
    expected = []
    for score, row, ref_row in zip(
        scores.tolist(), tokens(logprobs, mask), tokens(ref_logprobs, mask), strict=True
    ):
        rewards = [-beta * (log - ref_log) for log, ref_log in zip(row, ref_row, strict=True)]
        rewards[-1] += score
        expected.append(rewards)
    result = token_rewards(
        scores,
        spoil(logprobs, mask, extra, rubbish),
        spoil(ref_logprobs, mask, extra, rubbish),
        spoil(mask, mask, extra, False),
        beta,
    )
    assert result.shape == (len(lengths), max(lengths) + extra)
    for rewards, row in zip(expected, result, strict=True):
        assert row.tolist() == pytest.approx(rewards + [0.0] * (len(row) - len(rewards)), abs=1e-5)


def test_only_unfinished_responses_pay() -> None:
    scores = torch.tensor([0.5, -0.5, 2.0])
    ended = torch.tensor([True, False, False])
    assert penalise_unfinished(scores, ended, penalty=1.0).tolist() == [0.5, -1.5, 1.0]
    assert penalise_unfinished(scores, ended, penalty=0.0).tolist() == scores.tolist()


@pytest.mark.parametrize(
    ("kl", "beta"),
    [
        (12.0, 0.201024),  # twice the target: clipped at +0.2
        (6.0, 0.2),
        (6.6, 0.2 * (1 + 0.1 * 256 / 10_000)),
        (5.4, 0.2 * (1 - 0.1 * 256 / 10_000)),
        (0.0, 0.2 * (1 - 0.2 * 256 / 10_000)),
        (-1.0, 0.2 * (1 - 0.2 * 256 / 10_000)),  # an estimate may be negative
    ],
)
def test_adaptive_beta(kl: float, beta: float) -> None:
    assert adaptive_beta(0.2, kl, target=6.0, episodes=256, horizon=10_000) == pytest.approx(beta, abs=1e-9)


def test_adaptive_beta_settles_where_the_divergence_is_the_target() -> None:
    """Against a policy whose divergence falls with β, the controller finds the β of the target."""
    beta = 0.02
    for _ in range(2_000):
        beta = adaptive_beta(beta, kl=0.3 / beta, target=6.0, episodes=256, horizon=10_000)
    assert beta == pytest.approx(0.05, rel=1e-3)
