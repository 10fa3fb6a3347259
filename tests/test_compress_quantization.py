"""The equations of quantisation, against their bounds and against what others compute."""

import pytest
import torch

from tasks.compress.quantization import (
    fake_quantized,
    from_integers,
    scales,
    smoothing_factors,
    to_integers,
)


def normal(rows: int = 256, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 16), (4, None), (4, 32), (2, 8)])
def test_no_weight_is_further_than_half_a_scale_from_its_integer(bits: int, group_size: int | None) -> None:
    weight = normal()
    scale = scales(weight, bits, group_size)
    integers = to_integers(weight, scale, bits)
    error = (from_integers(integers, scale) - weight).abs().view(256, scale.shape[1], -1)
    assert scale.shape == (256, 1 if group_size is None else 64 // group_size)
    assert (error <= scale.unsqueeze(-1) / 2 * (1 + 1e-4)).all()
    assert integers.dtype == torch.int8
    assert (integers.min(), integers.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_int8_by_row_loses_six_thousandths_of_a_normal_weight() -> None:
    weight = normal(4096, 64)
    scale = scales(weight, 8, None)
    error = from_integers(to_integers(weight, scale, 8), scale) - weight
    assert float(error.norm() / weight.norm()) == pytest.approx(0.0059, abs=2e-4)


def test_smaller_groups_and_more_bits_lose_less() -> None:
    weight = normal()

    def lost(bits: int, group_size: int | None) -> float:
        scale = scales(weight, bits, group_size)
        return float((from_integers(to_integers(weight, scale, bits), scale) - weight).norm())

    assert lost(8, None) < lost(4, 8) < lost(4, 32) < lost(4, None)


def test_a_row_of_zeros_stays_zeros() -> None:
    weight = torch.zeros(2, 8)
    scale = scales(weight, 8, None)
    assert (scale > 0).all()
    assert (from_integers(to_integers(weight, scale, 8), scale) == 0).all()


def test_the_integers_are_those_that_compressed_tensors_makes() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = normal()
    groups = weight.view(256, 2, 32)
    given = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    theirs, zero = calculate_qparams(groups.amin(dim=-1), groups.amax(dim=-1), given)
    ours = scales(weight, 4, 32)
    torch.testing.assert_close(theirs, ours)
    assert (quantize(weight, ours, zero, given, dtype=torch.int8) == to_integers(weight, ours, 4)).all()


def test_fake_quantisation_rounds_forwards_and_passes_gradients_straight_through() -> None:
    weight = normal().requires_grad_()
    scale = scales(weight.detach(), 4, 16)
    out = fake_quantized(weight, 4, 16)
    expected = from_integers(to_integers(weight.detach(), scale, 4), scale)
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=1e-6)
    asked = normal(seed=1)
    out.backward(asked)
    assert weight.grad is not None
    assert torch.equal(weight.grad, asked)


def test_smoothing_shares_the_difficulty_between_activations_and_weights() -> None:
    activations, weights = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([0.25, 0.25, 0.25])
    factors = smoothing_factors(activations, weights, 0.5)
    assert factors.tolist() == pytest.approx([20.0, 2.0, 1.0])
    assert (activations / factors)[:2].tolist() == pytest.approx((weights * factors)[:2].tolist())
    assert smoothing_factors(activations, weights, 1.0)[:2].tolist() == pytest.approx([100.0, 1.0])


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    """Dettmers et al. 2023, arXiv 2305.14314: eight above zero, seven below, zero itself, scaled to 1."""
    from bitsandbytes.functional import create_normal_map
    from scipy.stats import norm

    end = 0.9677083
    above = norm.ppf(torch.linspace(end, 0.5, 9)[:-1].numpy())
    below = -norm.ppf(torch.linspace(end, 0.5, 8)[:-1].numpy())
    expected = torch.tensor(sorted([*above, 0.0, *below]), dtype=torch.float32)
    levels = create_normal_map()
    found = levels[levels.nonzero().flatten()].sort().values
    torch.testing.assert_close(found, (expected / expected.max())[expected != 0], rtol=1e-4, atol=1e-4)
