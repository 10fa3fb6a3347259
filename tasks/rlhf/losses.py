"""The losses of PPO (arXiv 1707.06347) and of the reward model (arXiv 2203.02155).

The PPO losses come back as sums over tokens, not as means: the sums of micro-batches add up to the sum of the
minibatch, whatever their lengths. Divide by the number of real tokens of the whole minibatch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.rlhf.masked import masked_sum, masked_var, on_tokens
from tasks.rlhf.rewards import k3


class PolicyLoss(NamedTuple):
    """Sums over real tokens: scalars, of which `total` alone carries a gradient."""

    total: Tensor
    clipped: Tensor  # how many tokens the clip holds back
    kl: Tensor  # KL(old ‖ new) in nats, estimated by k3: how far this update has gone


class ValueLoss(NamedTuple):
    """Sums over real tokens: scalars, of which `total` alone carries a gradient."""

    total: Tensor
    clipped: Tensor  # at how many tokens the clipped error is the larger one


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> PolicyLoss:
    """Return the clipped surrogate of arXiv 1707.06347 eq. 7, negated: Σ max(−Âρ, −Â·clip(ρ, 1 ± clip)).

    ρ = π / π_old. All tensors are `[B, T]`. Where the clip holds a token back its gradient is 0.
    """
    log_ratio = on_tokens(logprobs - old_logprobs, mask)
    ratio = log_ratio.exp()
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return PolicyLoss(
        total=masked_sum(torch.maximum(free, held), mask),
        clipped=masked_sum((held > free).float(), mask),
        kl=masked_sum(k3(old_logprobs, logprobs.detach()), mask),
    )


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> ValueLoss:
    """Return ½·Σ max((V − R)², (V_clipped − R)²) with V_clipped within `clip` of the old value.

    As openai/baselines and lm-human-preferences do it (arXiv 2005.12729 §3). All tensors are `[B, T]`.
    """
    values = on_tokens(values, mask)
    near = torch.clamp(values, old_values - clip, old_values + clip)
    free = (values - returns).square()
    held = (near - returns).square()
    return ValueLoss(
        total=masked_sum(torch.maximum(free, held), mask) / 2,
        clipped=masked_sum((held > free).float(), mask),
    )


def preference_loss(score_differences: Tensor) -> Tensor:
    """Return the mean of −log σ(r_preferred − r_other) over `[N]` pairs (arXiv 2203.02155 eq. 1)."""
    return -F.logsigmoid(score_differences).mean()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 − Var(R − V) / Var(R) over real tokens of `[B, T]`: 1 is perfect, 0 no better than a constant.

    Not finite where all returns are equal.
    """
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask)
