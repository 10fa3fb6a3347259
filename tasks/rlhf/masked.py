"""Statistics over the real tokens of a padded batch.

A mask `[B, T]` (bool, or int with 1 on real tokens) says which numbers count. What stands on padding counts
nowhere, whatever it is: it is replaced by 0 before anything is computed, so that no NaN comes back through the
gradient either. A statistic of no token at all is NaN.
"""

import torch
from torch import Tensor


def on_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` `[B, T]` with 0 on padding."""
    return x.masked_fill(~mask.bool(), 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of `x` `[B, T]` over all real tokens: a scalar."""
    return on_tokens(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `x` `[B, T]` over all real tokens (not a mean of row means): a scalar."""
    return masked_sum(x, mask) / mask.bool().sum()


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Return the variance of `x` `[B, T]` over all real tokens, divided by their number (biased): a scalar."""
    x = on_tokens(x, mask)
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` `[B, T]` shifted and scaled to mean 0 and variance 1 over all real tokens; 0 on padding.

    As the code of arXiv 1909.08593 (openai/lm-human-preferences) does it: biased variance, the mean removed,
    1e-8 added to the variance under the root.
    """
    x = on_tokens(x, mask)
    scale = torch.rsqrt(masked_var(x, mask) + 1e-8)
    return on_tokens((x - masked_mean(x, mask)) * scale, mask)
