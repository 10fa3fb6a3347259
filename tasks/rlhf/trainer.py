"""Proximal policy optimisation of a language model (arXiv 1707.06347, as in 1909.08593 and 2203.02155).

`Ppo.step` is one step of the algorithm: answer, score, estimate advantages, update. Its random numbers come
from the seed and the number of the step, so that the step count is all the random state there is. In several
processes each answers its share of the prompts and learns from its own answers; what is estimated, and every
update, is that of all episodes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.data.records import Example
from tasks.metrics.surface import distinct_2
from tasks.rlhf.advantages import gae
from tasks.rlhf.losses import explained_variance, policy_loss, value_loss
from tasks.rlhf.masked import masked_mean, masked_sum, whiten
from tasks.rlhf.policy import Policy
from tasks.rlhf.rewards import adaptive_beta, k1, k3, penalise_unfinished, token_rewards
from tasks.rlhf.rollout import Reward, Rollout, collect, joined, padded, part
from tasks.rlhf.settings import Kl, Rollouts, Update
from tasks.stage.place import ALONE, Place

ADAM_EPS = 1e-5  # arXiv 2403.17031, detail 17


class Change(NamedTuple):
    """What one optimizer step saw, each the mean over the tokens of its minibatch."""

    policy_loss: float
    value_loss: float
    entropy: float
    clip_fraction: float
    value_clip_fraction: float
    kl: float  # nats, of the policy from the one that sampled


class Ppo:
    """A policy in training: the policy, its optimizer, and β.

    Args:
        policy: what is trained, in place.
        reward: what answers are worth.
        steps: how many steps there will be, for the learning rate.
        place: which of the processes that train the same policy this one is.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        kl: Kl,
        rollouts: Rollouts,
        update: Update,
        steps: int,
        seed: int,
        place: Place = ALONE,
    ) -> None:
        self.policy, self.reward, self.kl, self.rollouts, self.settings = policy, reward, kl, rollouts, update
        self.beta = kl.beta
        self._steps, self._seed, self._place = steps, seed, place
        self._named = dict(policy.parameters())
        acting = [each for name, each in self._named.items() if name.startswith("policy.")]
        valuing = [each for name, each in self._named.items() if not name.startswith("policy.")]
        self._optimizer = torch.optim.Adam([{"params": acting}, {"params": valuing}], eps=ADAM_EPS)

    def step(
        self, number: int, examples: Sequence[Example], prompts: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        """Take step `number` (from 0) on N examples, whose prompts are given as token ids; return what it
        saw.
        """
        settings, generator = self.settings, self.generator(number)
        for group, rate in zip(self._optimizer.param_groups, self.learning_rates(number), strict=True):
            group["lr"] = rate
        uniforms = torch.rand(len(prompts), self.rollouts.max_response_tokens, generator=generator)
        shared = self._place.part(examples), self._place.part(prompts), self._place.part(uniforms)
        answered = collect(self.policy, self.reward, *shared, self.rollouts.batch_size)
        rollout = joined(answered, prompts, self._place)
        responses, mask = rollout.responses, rollout.mask
        scores = penalise_unfinished(
            torch.tensor(rollout.scores.total), responses.ended, self.rollouts.unfinished_penalty
        )
        rewards = token_rewards(scores, responses.logprobs, rollout.ref_logprobs, mask, self.beta)
        advantages, returns = gae(rewards, responses.values, mask, settings.gamma, settings.lam)
        advantages = whiten(advantages, mask)
        changes = []
        together = self.rollouts.answers if settings.shuffle == "prompts" else 1
        for rows in minibatches(len(prompts), settings.epochs, settings.minibatches, generator, together):
            changes.append(self._update(rollout, rows, advantages, returns))
            if settings.stop_at_kl is not None and changes[-1].kl > settings.stop_at_kl:
                break
        seen = report(rollout, returns, changes) | {"beta": self.beta}
        if self.kl.target is not None:
            self.beta = adaptive_beta(self.beta, seen["kl"], self.kl.target, len(prompts), self.kl.horizon)
        return seen

    def _update(self, rollout: Rollout, rows: Sequence[int], advantages: Tensor, returns: Tensor) -> Change:
        """One optimizer step on the episodes at `rows`: the mean over all their tokens, however they are
        cut up, by micro-batches and by processes.
        """
        settings, old = self.settings, rollout.responses
        tokens = int(rollout.mask[rows].sum())
        size = settings.micro_batch_size or len(rows)
        sums = torch.zeros(len(Change._fields))
        self._optimizer.zero_grad()
        share = self._place.share(len(rollout.prompts))
        own = [row for row in rows if row in share]
        for at in range(0, len(own), size):
            some = own[at : at + size]
            batch, width = part(self.policy, rollout.prompts, old, some)
            new = self.policy.evaluate(batch, padded(rollout.critic_states, some))
            mask, device = batch.response_mask.to(new.logprobs.device), new.logprobs.device
            were, valued, gained, due = (
                tensor[some, :width].to(device) for tensor in (old.logprobs, old.values, advantages, returns)
            )
            acting = policy_loss(new.logprobs, were, gained, mask, settings.clip)
            valuing = value_loss(new.values, valued, due, mask, settings.value_clip)
            ((acting.total + settings.value_weight * valuing.total) / tokens).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack(
                [acting.total, valuing.total, masked_sum(new.entropy, mask), acting.clipped, valuing.clipped,
                 acting.kl]
            ).detach().cpu()  # fmt: skip
        if self._place.processes > 1:
            self._place.add(sums)
            self._add_gradients()
        torch.nn.utils.clip_grad_norm_(self._named.values(), settings.max_grad_norm)
        self._optimizer.step()
        return Change(*(sums / tokens).tolist())

    def _add_gradients(self) -> None:
        """Replace each gradient by its sum over the processes; one without episodes in the minibatch adds 0."""
        parameters = list(self._named.values())
        flat = torch.cat(
            [(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in parameters]
        )
        self._place.add(flat)
        found = torch.split(flat, [each.numel() for each in parameters])
        for each, gradient in zip(parameters, found, strict=True):
            each.grad = gradient.view_as(each)

    def learning_rates(self, number: int) -> tuple[float, float]:
        """The learning rates of the policy and of the value function at step `number`."""
        left = 1 - number / self._steps
        acting = 0.0 if number < self.settings.value_warmup else self.settings.learning_rate * left
        return acting, self.settings.value_learning_rate * left

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of step `number`."""
        return torch.Generator().manual_seed((self._seed << 32) + number)

    def state(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by name: what is trained, and Adam's moments of it."""
        moments = self._optimizer.state
        return {name: parameter.detach().clone() for name, parameter in self._named.items()} | {
            f"adam.{moment}.{name}": value.detach().clone()
            for name, parameter in self._named.items()
            for moment, value in moments[parameter].items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state`."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(state[name])
        self._optimizer.state.clear()
        for name, parameter in self._named.items():
            places = {"step": torch.device("cpu"), "exp_avg": parameter.device, "exp_avg_sq": parameter.device}
            found = {
                moment: state[key].to(place, copy=True)
                for moment, place in places.items()
                if (key := f"adam.{moment}.{name}") in state
            }
            if found:
                self._optimizer.state[parameter] = found


def minibatches(
    episodes: int, epochs: int, parts: int, generator: torch.Generator, together: int = 1
) -> Iterator[list[int]]:
    """Yield the row numbers of each optimizer step: every epoch sees every episode once, in a new order; each
    `together` rows that follow one another stay so.
    """
    groups = episodes // together
    size = math.ceil(groups / parts)
    for _ in range(epochs):
        order: list[int] = torch.randperm(groups, generator=generator).tolist()
        for at in range(0, groups, size):
            yield [together * group + row for group in order[at : at + size] for row in range(together)]


def report(rollout: Rollout, returns: Tensor, changes: Sequence[Change]) -> dict[str, float]:
    """What a step saw: of its episodes, and of its optimizer steps (their mean; `update_kl` is the last
    one's).
    """
    responses, mask = rollout.responses, rollout.mask
    leaving = (responses.logprobs, rollout.ref_logprobs)
    episodes = len(rollout.prompts)
    mean = Change(*torch.tensor(changes).mean(dim=0).tolist())
    parts: dict[str, Any] = {
        f"reward_{name}": sum(values) / episodes for name, values in rollout.scores.parts.items()
    }
    if responses.engine_logprobs is not None:
        leaving_own = k1(responses.engine_logprobs, responses.logprobs)
        parts["engine_kl"] = float(masked_sum(leaving_own, mask)) / episodes
    return parts | {
        "reward": sum(rollout.scores.total) / episodes,
        "kl": float(masked_sum(k1(*leaving), mask)) / episodes,
        "kl_k3": float(masked_sum(k3(*leaving), mask)) / episodes,
        "entropy": mean.entropy,
        "policy_loss": mean.policy_loss,
        "value_loss": mean.value_loss,
        "clip_fraction": mean.clip_fraction,
        "value_clip_fraction": mean.value_clip_fraction,
        "explained_variance": float(explained_variance(responses.values, returns, mask)),
        "value": float(masked_mean(responses.values, mask)),
        "update_kl": changes[-1].kl,
        "updates": len(changes),
        "response_tokens": float(mask.sum()) / episodes,
        "ended": float(responses.ended.float().mean()),
        "distinct_2": distinct_2(responses.answers),
    }
