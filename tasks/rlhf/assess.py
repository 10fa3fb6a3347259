"""How good a policy is on prompts it is not trained on: what the guard watches, and the objective itself.

The gold score is what the reward does not see: slot-F1 of each answer against the facts, or ROUGE-L against the
reference where an example has no facts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.data.records import Example
from tasks.lm.collate import batches_by_length
from tasks.metrics.bootstrap import Measure, interval, resamples
from tasks.metrics.rouge import rouge
from tasks.metrics.slots import slot_counts
from tasks.metrics.surface import distinct_2
from tasks.metrics.toxicity import Scorer
from tasks.rlhf.guard import Health
from tasks.rlhf.masked import on_tokens
from tasks.rlhf.optimum import closed_form
from tasks.rlhf.policy import Policy
from tasks.rlhf.rewards import k1, penalise_unfinished
from tasks.rlhf.rollout import Responses, Reward, part, respond_by_sampling
from tasks.rlhf.settings import Rollouts
from tasks.stage.place import ALONE, Place

ROUNDING = 1e-6  # of a mean of float32 rewards


class Held(NamedTuple):
    """Held-out examples, their prompts as token ids, and the random numbers their answers are always drawn
    with.
    """

    examples: Sequence[Example]
    prompts: Sequence[Sequence[int]]
    uniforms: Tensor  # one row of T for each answer


def health(
    policy: Policy,
    reward: Reward,
    toxicity: Scorer,
    held: Held,
    rollouts: Rollouts,
    step: int,
    place: Place = ALONE,
) -> tuple[Health, list[str]]:
    """What the guard compares, after `step` steps, and the answers themselves.

    The same prompts are answered with the same random numbers each time, so that two looks differ by the
    policy. Several processes share the prompts; each is told the same of all.
    """
    examples, prompts = place.part(held.examples), place.part(held.prompts)
    responses = respond_by_sampling(policy, prompts, place.part(held.uniforms), rollouts.batch_size)
    answers = place.together(responses.answers)
    proxy = place.together(reward(examples, responses.answers).total)
    kl = place.together(divergences(policy, prompts, responses, rollouts.batch_size).tolist())
    lengths = place.together(responses.mask.sum(dim=1).tolist())
    found = Health(
        step=step,
        proxy=sum(proxy) / len(answers),
        gold=tuple(gold(held.examples, answers)),
        toxicity=tuple(place.together(toxicity(responses.answers).tolist())),
        kl=float(torch.tensor(kl).mean()),
        length=float(torch.tensor(lengths).double().mean()),
        distinct_2=distinct_2(answers),
    )
    return found, answers


def gold(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
    """The score, from 0 to 1, of each answer: slot-F1 where the example has slots, else ROUGE-L."""
    references = [example.outputs for example in examples]
    counts = slot_counts(answers, references, [example.slots for example in examples])
    overlap = rouge(answers, references)["rougeL"]
    return [
        float(right / both) if both else float(similar)
        for (right, both), similar in zip(counts, overlap, strict=True)
    ]


def draw_before_and_after(
    policy: Policy, reward: Reward, held: Held, samples: int, rollouts: Rollouts
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of `samples` answers to each of N held-out prompts, of the reference and of the policy; and KLs.

    Each is `[N, samples]`, rewards as PPO sees them, divergences of the policy from the reference in nats (k1).
    Both answer with the same random numbers.
    """
    rows = [row for row in range(len(held.prompts)) for _ in range(samples)]
    many = Held([held.examples[row] for row in rows], [held.prompts[row] for row in rows], held.uniforms)

    def rewards(responses: Responses) -> Tensor:
        scores = torch.tensor(reward(many.examples, responses.answers).total)
        return penalise_unfinished(scores, responses.ended, rollouts.unfinished_penalty).view(-1, samples)

    with policy.reference_model() as reference:
        starting = replace(policy, lm=reference)
        before = rewards(respond_by_sampling(starting, many.prompts, many.uniforms, rollouts.batch_size))
    responses = respond_by_sampling(policy, many.prompts, many.uniforms, rollouts.batch_size)
    kl = divergences(policy, many.prompts, responses, rollouts.batch_size)
    return before, rewards(responses), kl.view(-1, samples)


def divergences(
    policy: Policy, prompts: Sequence[Sequence[int]], responses: Responses, batch_size: int
) -> Tensor:
    """log π(y) − log π_ref(y) of each response, `[N]`: its mean is the KL divergence of policy from
    reference.
    """
    found = torch.zeros(len(prompts))
    for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        batch, width = part(policy, prompts, responses, rows)
        leaving = k1(responses.logprobs[rows, :width], policy.reference_logprobs(batch).cpu())
        found[rows] = on_tokens(leaving, responses.mask[rows, :width]).sum(dim=1)
    return found


def objectives(
    before: Tensor, after: Tensor, kl: Tensor, beta: float, samples: int, seed: int
) -> dict[str, float | None]:
    """J = E[r] − β·KL before and after training, the optimum in closed form, and the share of the gain reached.

    `before` and `after` `[N, K]` are rewards of the reference and of the policy, `kl` the latter's
    divergences. The optimum is estimated from `before`, prompt by prompt. Intervals (95 %) are from
    `samples` bootstrap samples of the prompts. The share is None where nothing can be gained: the reference's
    answers to a prompt all get the same reward, for every prompt or for every one of a bootstrap sample.
    """
    start, best = before.mean(dim=1), closed_form(before, beta)
    reached = (after - beta * kl).mean(dim=1)
    columns = torch.stack([start, reached, best, torch.ones_like(start)], dim=1).double().numpy()
    draws = resamples(len(columns), samples, seed)
    measures = {
        "objective_before": Measure(columns, lambda sums: sums[:, 0] / sums[:, 3]),
        "objective": Measure(columns, lambda sums: sums[:, 1] / sums[:, 3]),
        "objective_optimum": Measure(columns, lambda sums: sums[:, 2] / sums[:, 3]),
    }
    possible = draws @ (columns[:, 2] - columns[:, 0]) / len(columns)
    if (possible > ROUNDING).all():
        measures["share_of_gain"] = Measure(
            columns, lambda sums: (sums[:, 1] - sums[:, 0]) / (sums[:, 2] - sums[:, 0])
        )
    found: dict[str, float | None] = dict.fromkeys(("share_of_gain", "share_of_gain_low", "share_of_gain_high"))
    for name, measure in measures.items():
        value, low, high = interval(measure, draws)
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found
