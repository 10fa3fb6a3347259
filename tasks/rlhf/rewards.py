"""What a sampled response earns token by token: its score, less what it pays for leaving the reference.

The three estimators of KL(π ‖ π_ref) at sampled tokens are those of Schulman, "Approximating KL Divergence"
(2020), with log r = log π_ref − log π. Over samples of π the mean of k1, and that of k3, is the divergence;
that of k2 comes close where the divergence is small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.rlhf.masked import on_tokens

MAX_ERROR = 0.2  # how far the relative error of the KL may move β: arXiv 1909.08593 §2.2


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return −log r `[B, T]`, in nats: unbiased, of high variance, negative on some tokens."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return (log r)² / 2 `[B, T]`, in nats: biased, of low variance, never negative."""
    return (ref_logprobs - logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return r − 1 − log r `[B, T]`, in nats: unbiased, of low variance, never negative."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return the reward of each token `[B, T]`: −β·k1 on every real one, the score on the last; 0 on padding.

    Their sum over a row is R(x, y) of arXiv 1909.08593 eq. 2. `scores` is `[B]`, the others `[B, T]`, padded on
    the right.
    """
    real = mask.bool()
    last = real & ~F.pad(real[:, 1:], (0, 1))
    penalty = on_tokens(beta * k1(logprobs, ref_logprobs), mask)
    return torch.where(last, scores.unsqueeze(1), 0.0) - penalty


def penalise_unfinished(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Return the scores `[B]`, less `penalty` for each response that did not end by itself.

    `ended` `[B]` (bool) is true where the end token closes the response (the "EOS trick" of arXiv 2403.17031).
    """
    return torch.where(ended, scores, scores - penalty)


def adaptive_beta(beta: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """Return the β of the next step, after one of `episodes` responses with a mean KL of `kl` nats each.

    β·(1 + clip(KL / target − 1, ±0.2)·episodes / horizon): arXiv 1909.08593 §2.2, where K_β stands for
    episodes / horizon, as its code has it.
    """
    error = min(max(kl / target - 1, -MAX_ERROR), MAX_ERROR)
    return beta * (1 + error * episodes / horizon)
