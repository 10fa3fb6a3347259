"""Small batches of responses of uneven length, with anything at all on their padding."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)
SEEDS = st.integers(0, 10**6)
EXTRA = st.integers(0, 4)
# What padding may hold: rubbish that would show, were it counted.
RUBBISH = st.sampled_from([0.0, 1e6, math.nan, math.inf])
MASK_TYPES = st.sampled_from([torch.int64, torch.bool])


def mask_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """1 on the first `lengths[b]` tokens of each row: `[B, max(lengths)]`."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(dtype)


def numbers(seed: int, lengths: list[int], count: int) -> list[Tensor]:
    """`count` tensors `[B, max(lengths)]` of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(lengths), max(lengths), generator=generator) for _ in range(count)]


def widen(x: Tensor, extra: int, value: float) -> Tensor:
    """`x` with `extra` more columns on the right."""
    return torch.nn.functional.pad(x, (0, extra), value=value)


def spoil(x: Tensor, mask: Tensor, extra: int, rubbish: float) -> Tensor:
    """`x` with `rubbish` wherever it is padded, and in `extra` more columns."""
    return widen(x.masked_fill(~mask.bool(), rubbish), extra, rubbish)


def tokens(x: Tensor, mask: Tensor) -> list[list[float]]:
    """The real numbers of each row, as floats."""
    return [row[keep].tolist() for row, keep in zip(x, mask.bool(), strict=True)]
