"""Generalised advantage estimation (arXiv 1506.02438) over responses of uneven length."""

import torch
from torch import Tensor

from tasks.rlhf.masked import on_tokens


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return the advantages and the returns that the value function shall learn, both `[B, T]`, 0 on padding.

    δ_t = r_t + γ·V_{t+1} − V_t and Â_t = δ_t + γλ·Â_{t+1} (eq. 16; arXiv 1707.06347 eq. 11 and 12); the return
    is Â_t + V_t. The value after the last real token of a row is 0: an episode ends there. `rewards`, `values`
    and `mask` are `[B, T]`, padded on the right.
    """
    values = on_tokens(values, mask)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    errors = on_tokens(rewards, mask) + gamma * following - values
    advantage = torch.zeros_like(errors[:, 0])
    backwards = []
    for error in reversed(errors.unbind(dim=1)):
        advantage = error + gamma * lam * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values
