"""The losses against the published numbers, their gradients, and the sums of micro-batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rlhf_toys import EXTRA, LENGTHS, MASK_TYPES, RUBBISH, SEEDS, mask_of, numbers, spoil, tokens
from torch import Tensor

from tasks.rlhf.losses import explained_variance, policy_loss, preference_loss, value_loss

CLIP = 0.2
ONE = torch.ones(1, 1)


def one_token(log_ratio: float, advantage: float) -> tuple[float, float, float]:
    """The policy loss of one token, whether it is clipped, and its gradient."""
    logprobs = torch.full((1, 1), log_ratio, requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(1, 1), advantage * ONE, ONE, CLIP)
    loss.total.backward()
    assert logprobs.grad is not None
    return loss.total.item(), loss.clipped.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "total", "clipped"),
    [
        (1.0, 1.0, -1.2, True),
        (1.0, -1.0, -1 / math.e, False),
        (-1.0, 1.0, math.e, False),
        (-1.0, -1.0, 0.8, True),
        (1.0, 0.0, -1.0, False),
    ],
)
def test_policy_loss_of_one_token(advantage: float, log_ratio: float, total: float, clipped: bool) -> None:
    loss, held, gradient = one_token(log_ratio, advantage)
    assert loss == pytest.approx(total, abs=1e-6)
    assert held == clipped
    assert gradient == pytest.approx(0.0 if clipped else -advantage * math.exp(log_ratio), abs=1e-6)


@given(st.floats(-2, 2), st.floats(-3, 3))
def test_the_gradient_is_zero_exactly_where_the_clip_holds(log_ratio: float, advantage: float) -> None:
    ratio = math.exp(log_ratio)
    beyond = (advantage > 1e-3 and ratio > 1 + CLIP + 1e-4) or (advantage < -1e-3 and ratio < 1 - CLIP - 1e-4)
    inside = (advantage > 1e-3 and ratio < 1 + CLIP - 1e-4) or (advantage < -1e-3 and ratio > 1 - CLIP + 1e-4)
    loss, held, gradient = one_token(log_ratio, advantage)
    if beyond:
        assert (held, gradient) == (1, 0)
        assert loss == pytest.approx(-advantage * min(max(ratio, 1 - CLIP), 1 + CLIP), rel=1e-5)
    if inside:
        assert held == 0
        assert gradient == pytest.approx(-advantage * ratio, rel=1e-5)


@given(LENGTHS, SEEDS)
def test_a_policy_that_has_not_moved(lengths: list[int], seed: int) -> None:
    """Ratio 1 everywhere: the loss is −Σ Â, nothing is clipped, the divergence is 0."""
    mask = mask_of(lengths)
    logprobs, advantages = numbers(seed, lengths, 2)
    loss = policy_loss(logprobs, logprobs.clone(), advantages, mask, CLIP)
    assert loss.total.item() == pytest.approx(-sum(map(sum, tokens(advantages, mask))), abs=1e-5)
    assert (loss.clipped.item(), loss.kl.item()) == (0, 0)


def test_the_divergence_of_an_update_is_taken_over_samples_of_the_old_policy() -> None:
    """Summed over all outcomes with their old chances, it is KL(old ‖ new)."""
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    expected = (old * (old / new).log()).sum().item()
    estimates = [
        policy_loss(after.log().view(1, 1), before.log().view(1, 1), ONE, ONE, CLIP).kl.item()
        for before, after in zip(old, new, strict=True)
    ]
    assert sum(old[i].item() * estimate for i, estimate in enumerate(estimates)) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(
    ("value", "old", "target", "total", "clipped"),
    [
        (0.1, 0.0, 1.0, 0.5 * 0.9**2, False),  # within the clip
        (0.9, 0.0, 1.0, 0.5 * 0.8**2, True),  # beyond it towards the return: held at 0.2
        (-0.9, 0.0, 1.0, 0.5 * 1.9**2, False),  # away from the return: the larger error counts
        (1.0, 0.0, 1.0, 0.5 * 0.8**2, True),
        (2.9, 2.0, 3.0, 0.5 * 0.8**2, True),  # the clip is around the old value, not around 0
    ],
)
def test_value_loss_of_one_token(value: float, old: float, target: float, total: float, clipped: bool) -> None:
    values = torch.full((1, 1), value, requires_grad=True)
    loss = value_loss(values, old * ONE, target * ONE, ONE, CLIP)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(total, abs=1e-6)
    assert loss.clipped.item() == clipped
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(0.0 if clipped else value - target, abs=1e-6)


def both(seed: int, lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    """Three tensors `[B, T]`, the first two so close that the clip holds some tokens and not others; a mask."""
    first, second, third = numbers(seed, lengths, 3)
    return [first, first + 0.3 * second, third], mask_of(lengths)


@given(LENGTHS, SEEDS, EXTRA, RUBBISH, MASK_TYPES)
def test_padding_changes_nothing(
    lengths: list[int], seed: int, extra: int, rubbish: float, dtype: torch.dtype
) -> None:
    """Neither a sum nor a gradient: equal to those of each response alone, without padding."""
    inputs, mask = both(seed, lengths)
    spoilt = [spoil(x, mask, extra, rubbish) for x in inputs]
    leaf = spoilt[0].requires_grad_()
    wide = spoil(mask.to(dtype), mask, extra, False)
    for loss in (policy_loss, value_loss):
        leaf.grad = None
        padded = loss(*spoilt, wide, CLIP)
        padded.total.backward()
        assert leaf.grad is not None
        sums = [0.0] * len(padded)
        for row, length in enumerate(lengths):
            alone = [x[row : row + 1, :length].clone() for x in inputs]
            alone[0].requires_grad_()
            result = loss(*alone, torch.ones(1, length), CLIP)
            result.total.backward()
            sums = [total + part.item() for total, part in zip(sums, result, strict=True)]
            assert alone[0].grad is not None
            assert torch.allclose(leaf.grad[row, :length], alone[0].grad[0], atol=1e-6)
            assert leaf.grad[row, length:].eq(0).all()
        assert [part.item() for part in padded] == pytest.approx(sums, rel=1e-5, abs=1e-5)


@given(st.lists(st.integers(1, 7), min_size=2, max_size=8), SEEDS, st.integers(1, 7))
def test_micro_batches_add_up_to_the_batch(lengths: list[int], seed: int, size: int) -> None:
    """Divided by the tokens of the minibatch, sums of uneven micro-batches give its loss and gradient."""
    inputs, mask = both(seed, lengths)
    count = mask.sum()
    for loss in (policy_loss, value_loss):
        whole = inputs[0].clone().requires_grad_()
        at_once = loss(whole, *inputs[1:], mask, CLIP)
        (at_once.total / count).backward()
        parts = inputs[0].clone().requires_grad_()
        pieces = []
        for start in range(0, len(lengths), size):
            rows = slice(start, start + size)
            width = max(lengths[rows])  # a micro-batch is cut to its own longest response
            cut = [x[rows, :width] for x in (parts, *inputs[1:], mask)]
            piece = loss(*cut, CLIP)
            (piece.total / count).backward()
            pieces.append([part.item() for part in piece])
        assert whole.grad is not None
        assert parts.grad is not None
        assert torch.allclose(whole.grad, parts.grad, rtol=0, atol=1e-6)
        expected = [part.item() / count.item() for part in at_once]
        assert [sum(column) / count.item() for column in zip(*pieces, strict=True)] == pytest.approx(
            expected, abs=1e-6
        )


def test_only_the_total_carries_a_gradient() -> None:
    (leaf, other, third), mask = both(1, [3, 2])
    leaf.requires_grad_()
    for loss in (policy_loss, value_loss):
        result = loss(leaf, other, third, mask, CLIP)
        assert [part.requires_grad for part in result] == [True] + [False] * (len(result) - 1)


def test_preference_loss() -> None:
    assert preference_loss(torch.zeros(6)).item() == pytest.approx(math.log(2))
    differences = torch.tensor([2.0, -1.0, 0.5])
    expected = sum(math.log(1 + math.exp(-number)) for number in differences.tolist()) / 3
    assert preference_loss(differences).item() == pytest.approx(expected, abs=1e-6)
    assert preference_loss(torch.tensor([-200.0])).item() == pytest.approx(200.0)  # no overflow
    scores = torch.tensor([[0.3, -0.4], [1.0, 0.2]])
    difference = scores[:, 0] - scores[:, 1]
    moved = (scores + 7)[:, 0] - (scores + 7)[:, 1]
    assert preference_loss(difference).item() == pytest.approx(preference_loss(moved).item(), abs=1e-6)


@given(LENGTHS, SEEDS, EXTRA, RUBBISH)
def test_explained_variance(lengths: list[int], seed: int, extra: int, rubbish: float) -> None:
    lengths = [*lengths, 3]
    mask = mask_of(lengths)
    values, returns = numbers(seed, lengths, 2)
    real_values = values[mask.bool()].double()
    real_returns = returns[mask.bool()].double()
    residual = (real_returns - real_values).var(correction=0) / real_returns.var(correction=0)
    result = explained_variance(
        spoil(values, mask, extra, rubbish), spoil(returns, mask, extra, rubbish), spoil(mask, mask, extra, 0)
    )
    assert result.item() == pytest.approx(1 - residual.item(), rel=1e-3, abs=1e-4)


def test_explained_variance_of_perfect_and_of_constant_values() -> None:
    returns = torch.tensor([[1.0, 2.0, 4.0]])
    mask = torch.ones(1, 3)
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(torch.full((1, 3), 9.0), returns, mask).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3, abs=1e-5)
