"""The best that any policy can do under a KL penalty, in closed form: what PPO must approach and not pass.

J(π) = E_π[r] − β·KL(π ‖ π_ref) is largest at π*(y) ∝ π_ref(y)·e^{r(y)/β}, where it is β·ln E_ref[e^{r/β}]
(arXiv 1909.08593 §2.2, eq. 2; 2305.18290 eq. 4 and appendix A.1).
"""

import math
from typing import NamedTuple

from torch import Tensor


class TwoOutcomes(NamedTuple):
    """The optimal policy where a response is either good or bad."""

    bad: float  # the chance of a bad response
    kl: float  # nats
    objective: float


def closed_form(rewards: Tensor, beta: float) -> Tensor:
    """Return the largest J `[N]` of each prompt, from the rewards `[N, K]` of K responses of the reference.

    The mean over K samples stands in for the expectation, so the result is too low by about the variance of
    e^{r/β} over 2K·(its mean)², times β, and it never exceeds the best reward seen: where good responses are
    rare, take a large K. Without a penalty (β = 0) that best reward is the optimum.
    """
    if beta == 0:
        return rewards.amax(dim=1)
    samples = rewards.shape[1]
    return beta * ((rewards / beta).logsumexp(dim=1) - math.log(samples))


def objective(rewards: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Return J = E[r] − β·KL, a scalar, of a policy's responses: `rewards` and `kl` (nats) are `[N]`."""
    return rewards.mean() - beta * kl.mean()


def two_outcomes(bad: float, reward_bad: float, reward_good: float, beta: float) -> TwoOutcomes:
    """Return the optimal policy where the reference gives a bad response with the chance `bad`, in (0, 1)."""
    log_weights = (math.log(bad) + reward_bad / beta, math.log1p(-bad) + reward_good / beta)
    largest = max(log_weights)
    log_total = largest + math.log(sum(math.exp(weight - largest) for weight in log_weights))
    chance = math.exp(log_weights[0] - log_total)
    reward = chance * reward_bad + (1 - chance) * reward_good
    return TwoOutcomes(chance, kl=reward / beta - log_total, objective=beta * log_total)
