"""Which weights of a linear layer can go: by magnitude, or by magnitude and input (Wanda, arXiv 2306.11695).

A mask is True where a weight stays. Every choice is exact: it takes away the number of weights asked for, ties
broken by place.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

GROUP = 4  # of 2:4 sparsity, two of each four weights in a row stay (Mishra et al. 2021, 2104.08378)


def importance(weight: Tensor, norms: Tensor | None) -> Tensor:
    """Return |W| `[O, I]`, or |W|·‖X‖₂ (arXiv 2306.11695 eq. 1) with the norm of each input feature, `[I]`."""
    return weight.abs() if norms is None else weight.abs() * norms


def pruned_count(weights: int, sparsity: float) -> int:
    """How many of so many weights go."""
    return round(weights * sparsity)


def rows_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Take the same share of each row away: weights are compared within one output (arXiv 2306.11695 §3)."""
    return _without_least(scores, pruned_count(scores.shape[-1], sparsity))


def layer_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Take a share of the whole layer away."""
    return rows_mask(scores.reshape(1, -1), sparsity).view_as(scores)


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Take a share of all layers together away, so that some lose more than others."""
    flat = torch.cat([each.flatten() for each in scores.values()])
    parts = torch.split(layer_mask(flat, sparsity), [each.numel() for each in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


def two_of_four_mask(scores: Tensor) -> Tensor:
    """Keep the two best of each four weights in a row, `[O, I]` with I a multiple of 4."""
    return _without_least(scores.reshape(-1, GROUP), GROUP // 2).view_as(scores)


def unit_importance(parts: Sequence[Tensor]) -> Tensor:
    """Return the importance `[n]` of n units from that of their weights, each `[n, …]`: the root of the sum of
    squares.
    """
    return torch.stack([part.flatten(1).square().sum(dim=1) for part in parts]).sum(dim=0).sqrt()


def best_units(scores: Tensor, kept: int) -> list[int]:
    """The `kept` units of the highest scores `[n]`, in their order."""
    order = scores.argsort(descending=True, stable=True)[:kept]
    found: list[int] = order.sort().values.tolist()
    return found


def _without_least(scores: Tensor, count: int) -> Tensor:
    """False at the `count` lowest scores of each row."""
    least = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, least, False)
