"""Advantages against the published numbers and against the double sum of the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rlhf_toys import EXTRA, LENGTHS, MASK_TYPES, RUBBISH, SEEDS, mask_of, numbers, spoil, tokens

from tasks.rlhf.advantages import gae


def brute_force(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Σ_l (γλ)^l·δ_{t+l} for each t: arXiv 1506.02438 eq. 16, O(T²)."""
    after = [*values[1:], 0.0]
    return [
        sum(
            (gamma * lam) ** (k - t) * (rewards[k] + gamma * after[k] - values[k])
            for k in range(t, len(rewards))
        )
        for t in range(len(rewards))
    ]


@pytest.mark.parametrize(
    ("lam", "expected"), [(0.95, [0.45125, 0.475, 0.5]), (1.0, [0.5, 0.5, 0.5]), (0.0, [0.0, 0.0, 0.5])]
)
def test_published_numbers(lam: float, expected: list[float]) -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=lam)
    assert advantages.squeeze().tolist() == pytest.approx(expected)
    assert returns.squeeze().tolist() == pytest.approx([advantage + 0.5 for advantage in expected])


@given(LENGTHS, SEEDS, EXTRA, RUBBISH, MASK_TYPES, st.floats(0, 1), st.floats(0, 1))
def test_the_double_sum_whatever_the_lengths_and_the_padding(
    lengths: list[int], seed: int, extra: int, rubbish: float, dtype: torch.dtype, gamma: float, lam: float
) -> None:
    mask = mask_of(lengths, dtype)
    rewards, values = numbers(seed, lengths, 2)
    advantages, returns = gae(
        spoil(rewards, mask, extra, rubbish),
        spoil(values, mask, extra, rubbish),
        spoil(mask, mask, extra, False),
        gamma,
        lam,
    )
    assert advantages.shape == returns.shape == (len(lengths), max(lengths) + extra)
    rows = zip(tokens(rewards, mask), tokens(values, mask), advantages, returns, strict=True)
    for row, row_values, result, learn in rows:
        expected = brute_force(row, row_values, gamma, lam)
        nothing = [0.0] * (len(result) - len(row))
        assert result.tolist() == pytest.approx(expected + nothing, abs=1e-5)
        totals = [advantage + value for advantage, value in zip(expected, row_values, strict=True)]
        assert learn.tolist() == pytest.approx(totals + nothing, abs=1e-5)


@given(LENGTHS, SEEDS)
def test_without_discount_and_with_lambda_one_the_return_is_the_sum_of_what_follows(
    lengths: list[int], seed: int
) -> None:
    mask = mask_of(lengths)
    rewards, values = numbers(seed, lengths, 2)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for row, learn in zip(tokens(rewards, mask), tokens(returns, mask), strict=True):
        assert learn == pytest.approx([sum(row[t:]) for t in range(len(row))], abs=1e-5)


@given(LENGTHS, SEEDS)
def test_a_row_does_not_know_its_neighbours(lengths: list[int], seed: int) -> None:
    mask = mask_of(lengths)
    rewards, values = numbers(seed, lengths, 2)
    together = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for row in range(len(lengths)):
        alone = gae(rewards[row : row + 1], values[row : row + 1], mask[row : row + 1], gamma=0.9, lam=0.8)
        for all_rows, one_row in zip(together, alone, strict=True):
            assert torch.equal(all_rows[row : row + 1], one_row)


def test_perfect_values_leave_no_advantage() -> None:
    rewards = torch.tensor([[0.1, -0.2, 1.0], [0.0, 0.7, 0.0]])
    mask = mask_of([3, 2])
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert advantages.abs().max() < 1e-6
    assert torch.allclose(returns, values * mask)
