"""Integers for weights: the equations of quantisation, which know no model.

Symmetric quantisation r = S·q (Jacob et al. 2018, arXiv 1712.05877 eq. 1 with Z = 0) with one scale for each
row of a weight, or for each group of `group_size` weights in a row. SmoothQuant moves what is hard to quantise
from activations to weights (Xiao et al. 2023, arXiv 2211.10438).
"""

import torch
from torch import Tensor


def scales(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """The scale `[N, G]` of each group of a weight `[N, K]`: G = K / `group_size`, or 1 where it is None.

    With 2·max|w| / (2^bits − 1) the 2^bits integers reach from one end to the other, and no weight is further
    than half a scale from its integer.
    """
    largest = _groups(weight, group_size).abs().amax(dim=-1)
    spread: Tensor = 2 * largest / (2**bits - 1)
    return spread.clamp(min=torch.finfo(weight.dtype).tiny)


def to_integers(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The integers `[N, K]` (int8, in −2^(bits−1) … 2^(bits−1) − 1) nearest to a weight `[N, K]`."""
    groups = _groups(weight, weight.shape[1] // scale.shape[1])
    rounded = (groups / scale.unsqueeze(-1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return rounded.to(torch.int8).view(weight.shape)


def from_integers(integers: Tensor, scale: Tensor) -> Tensor:
    """The weight `[N, K]` that integers `[N, K]` and scales `[N, G]` stand for."""
    groups = _groups(integers, integers.shape[1] // scale.shape[1])
    return (groups * scale.unsqueeze(-1)).view(integers.shape)


def fake_quantized(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """The weight `[N, K]` after a trip through integers; its gradient passes straight through.

    Training sees the error of rounding, and learns weights that bear it (arXiv 1712.05877 §3; the
    straight-through estimator is that of Bengio et al. 2013, arXiv 1308.3432).
    """
    with torch.no_grad():
        scale = scales(weight, bits, group_size)
        error = from_integers(to_integers(weight, scale, bits), scale) - weight
    return weight + error


def smoothing_factors(activations: Tensor, weights: Tensor, strength: float) -> Tensor:
    """What to divide each input channel by: max|X_j|^α / max|W_j|^(1 − α) (arXiv 2211.10438), `[K]`.

    `activations` and `weights` are the largest absolute values of each channel, `[K]`; `strength` is α. A
    channel that is never used is left alone.
    """
    factors = activations.pow(strength) / weights.pow(1 - strength)
    return torch.where((activations > 0) & (weights > 0), factors, torch.ones_like(factors))


def _groups(weight: Tensor, group_size: int | None) -> Tensor:
    """`[N, K]` as `[N, G, group_size]`."""
    return weight.view(weight.shape[0], -1, group_size or weight.shape[1])
