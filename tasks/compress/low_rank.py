"""The nearest product of two narrower matrices."""

import torch
from torch import Tensor


def low_rank(
    left: Tensor, right: Tensor, rank: int, left_norms: Tensor, right_norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `[O, rank]` and `[rank, I]`, whose product is nearest to `left` `[O, R]` times `right` `[R, I]`.

    Nearest by the sum of squared differences (Eckart & Young 1936), each weighted with `left_norms` `[O]` and
    `right_norms` `[I]`: how large the features are that meet there (as ASVD does, arXiv 2312.05821).
    """
    rows, columns = (_weights(norms, like) for norms, like in ((left_norms, left), (right_norms, right)))
    left_basis, left_rest = torch.linalg.qr(rows.unsqueeze(1) * left.double())
    right_basis, right_rest = torch.linalg.qr((right.double() * columns).T)
    outer, values, inner = torch.linalg.svd(left_rest @ right_rest.T)
    size = values[:rank].sqrt()
    narrow_left = left_basis @ outer[:, :rank] * size / rows.unsqueeze(1)
    narrow_right = (right_basis @ inner[:rank].T * size / columns.unsqueeze(1)).T
    return narrow_left.to(left.dtype), narrow_right.to(right.dtype)


def _weights(norms: Tensor, like: Tensor) -> Tensor:
    """The norms in double precision; a feature that is never seen counts next to nothing, but not nothing."""
    norms = norms.to(like.device).double()
    return norms.clamp(min=max(1e-6 * norms.max().item(), torch.finfo(torch.float64).tiny))
