"""The losses of distillation (Hinton et al. 2015, arXiv 1503.02531) and what a teacher is remembered by.

Losses come back as sums over tokens: those of micro-batches add up to that of the batch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SoftTargets(NamedTuple):
    """What a teacher foresees at N tokens, softened: its k likeliest tokens, and all others as one outcome."""

    ids: Tensor  # [N, k] int64
    logprobs: Tensor  # [N, k + 1] float32, the last: any other token (−inf where there is none)


def soft_targets(logits: Tensor, temperature: float, top_k: int | None) -> SoftTargets:
    """Return softmax(logits / T) (arXiv 1503.02531 eq. 1) of `[N, V]`, its `top_k` likeliest tokens by name.

    `None`, or more than there are: every token by name.
    """
    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    size = logprobs.shape[-1]
    kept, ids = logprobs.topk(size if top_k is None else min(top_k, size), dim=-1)
    return SoftTargets(ids, torch.cat((kept, _others(logprobs, ids)), dim=-1))


def soft_loss(logits: Tensor, targets: SoftTargets, temperature: float) -> Tensor:
    """Return Σ T²·KL(teacher_T ‖ student_T) over N tokens, from the student's `logits` `[N, V]`.

    The factor T² keeps the gradient of the soft targets as large as that of hard ones when T changes (arXiv
    1503.02531 §2). Tokens that the targets do not name are one outcome for both, so that the result is never
    above the divergence over all tokens, and equal to it where all are named.
    """
    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    named = torch.cat((logprobs.gather(-1, targets.ids), _others(logprobs, targets.ids)), dim=-1)
    chances = targets.logprobs.exp()
    # where the teacher sees no chance nothing is added, whatever the student sees
    gaps = torch.where(chances > 0, targets.logprobs - named, 0.0)
    return temperature**2 * (chances * gaps).sum()


def distillation_loss(
    logits: Tensor, labels: Tensor, targets: SoftTargets, alpha: float, temperature: float
) -> Tensor:
    """Return α·T²·KL(teacher_T ‖ student_T) + (1 − α)·cross-entropy, summed over N tokens.

    The weighted average of both objectives of arXiv 1503.02531 §2; the hard one at temperature 1. `logits` are
    `[N, V]`, `labels` `[N]`.
    """
    hard = F.cross_entropy(logits.float(), labels, reduction="sum")
    return alpha * soft_loss(logits, targets, temperature) + (1 - alpha) * hard


def state_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return Σ‖h_student − h_teacher‖² / Σ‖h_teacher‖² `[B]` over the tokens of `mask` `[B, T]`.

    `student` and `teacher` are states `[B, T, D]`. The distance of hidden states that TinyBERT learns (arXiv
    1909.10351 §3.1, without a map between widths), told in shares of the teacher's own size.
    """
    apart, size = ((each.square().sum(dim=-1) * mask).sum(dim=1) for each in (student - teacher, teacher))
    return apart / size


def _others(logprobs: Tensor, ids: Tensor) -> Tensor:
    """The log-probability `[N, 1]` of all tokens of `logprobs` `[N, V]` but `ids` `[N, k]`."""
    return logprobs.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
