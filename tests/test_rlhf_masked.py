"""Masked statistics against Python's own, whatever stands on the padding."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from rlhf_toys import EXTRA, LENGTHS, MASK_TYPES, RUBBISH, SEEDS, mask_of, numbers, spoil, tokens

from tasks.rlhf.masked import masked_mean, masked_sum, masked_var, on_tokens, whiten


@given(LENGTHS, SEEDS, EXTRA, RUBBISH, MASK_TYPES)
def test_statistics_are_those_of_the_real_tokens(
    lengths: list[int], seed: int, extra: int, rubbish: float, dtype: torch.dtype
) -> None:
    mask = mask_of(lengths, dtype)
    (x,) = numbers(seed, lengths, 1)
    real = [number for row in tokens(x, mask) for number in row]
    x = spoil(x, mask, extra, rubbish)
    mask = spoil(mask, mask, extra, False)
    assert masked_sum(x, mask).item() == pytest.approx(math.fsum(real), abs=1e-5)
    assert masked_mean(x, mask).item() == pytest.approx(statistics.fmean(real), abs=1e-6)
    assert masked_var(x, mask).item() == pytest.approx(statistics.pvariance(real), abs=1e-5)
    assert on_tokens(x, mask)[~mask.bool()].eq(0).all()


@given(LENGTHS, SEEDS, EXTRA, RUBBISH, MASK_TYPES)
def test_whitening_follows_its_formula(
    lengths: list[int], seed: int, extra: int, rubbish: float, dtype: torch.dtype
) -> None:
    mask = mask_of(lengths, dtype)
    (x,) = numbers(seed, lengths, 1)
    rows = tokens(x, mask)
    real = [number for row in rows for number in row]
    mean, variance = statistics.fmean(real), statistics.pvariance(real)
    whitened = whiten(spoil(x, mask, extra, rubbish), spoil(mask, mask, extra, False))
    for row, result in zip(rows, whitened, strict=True):
        expected = [(number - mean) / math.sqrt(variance + 1e-8) for number in row]
        assert result.tolist() == pytest.approx(expected + [0.0] * (len(result) - len(row)), abs=2e-3)


def test_whitening_is_the_one_of_three_that_openai_published() -> None:
    x, mask = torch.tensor([[1.0, 2.0, 3.0, 6.0]]), torch.ones(1, 4)
    ours = whiten(x, mask)
    unbiased = (x - x.mean()) / x.std(unbiased=True)  # as TRL has it
    mean_kept = unbiased + x.mean()  # as torchtune has it
    assert ours.squeeze().tolist() == pytest.approx([-1.0690, -0.5345, 0.0, 1.6036], abs=1e-4)
    assert (unbiased.min().item(), unbiased.max().item()) == pytest.approx((-0.926, 1.389), abs=1e-3)
    assert (mean_kept.min().item(), mean_kept.max().item()) == pytest.approx((2.074, 4.389), abs=1e-3)
    assert not torch.allclose(ours, unbiased, atol=0.05)
    assert not torch.allclose(ours, mean_kept, atol=0.05)


def test_whitening_equal_numbers_gives_zeros() -> None:
    assert whiten(torch.full((2, 3), 0.7), torch.ones(2, 3)).abs().max() < 1e-3


def test_one_mean_over_all_tokens_is_not_a_mean_of_row_means() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    assert masked_mean(x, mask_of([3, 1])).item() == 2.0


@pytest.mark.parametrize(
    "statistic", [masked_sum, masked_mean, masked_var, lambda x, m: whiten(x, m).square().sum()]
)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_rubbish_on_padding_gives_no_gradient(statistic, rubbish: float) -> None:  # type: ignore[no-untyped-def]
    mask = mask_of([3, 1])
    (x,) = numbers(0, [3, 1], 1)
    x = spoil(x, mask, 1, rubbish).requires_grad_()
    statistic(x, spoil(mask, mask, 1, 0)).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[1, 1:].eq(0).all()
