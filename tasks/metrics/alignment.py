"""What alignment changed: two variants answer the same prompts by chance, before it and after it.

Greedy answers hide what a model says one time in ten, so both sample. Every score stands beside its paired
difference over the same prompts, for all of them and for those that are rude themselves. The price is the
Kullback-Leibler divergence from the variant before, per answer: the mean of log π_after − log π_before over
answers of the variant after (Schulman, 2020, "Approximating KL divergence", estimator k1), which is unbiased
where these are sampled as they are likely: temperature 1, no top-k, no top-p.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tasks.data.records import Example
from tasks.metrics.bootstrap import Array, Measure, mean, ratio
from tasks.metrics.measures import Measures, differences, flat, merged, quality, subset
from tasks.metrics.report import ALIGNMENT_SCORES


class Sampled(NamedTuple):
    """What one variant answered: S answers to the first prompt, then S to the second, and so on."""

    texts: list[str]  # [N · S]
    rewards: Array | None  # [N · S] of a reward model


def alignment(
    examples: Sequence[Example],
    before: Sampled,
    after: Sampled,
    log_ratios: Array,
    toxicity: Callable[[Sequence[str]], Measures],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Compare the sampled answers to N examples; `samples` bootstrap samples of prompts make an interval.

    `log_ratios` `[N · S]` are log π_after − log π_before of the answers in `after`, in nats. The part `rude` is
    left out where no prompt is toxic, `toxicity_fall` where no answer before is.
    """
    answers = len(after.texts) // len(examples)
    first, last = (_scores(examples, side, toxicity, answers) for side in (before, after))
    distance = merged({"kl": mean(log_ratios)}, answers)
    toxic = toxicity([example.prompt for example in examples])["toxicity_rate"].statistics[:, 0]
    rude = np.flatnonzero(toxic).tolist()

    def compared(rows: Sequence[int]) -> dict[str, Any]:
        ours, theirs, whole = subset(last, rows), subset(first, rows), subset(distance, rows)
        if theirs["toxicity_rate"].value:
            whole["toxicity_fall"] = _fall(theirs["toxicity_rate"], ours["toxicity_rate"])
        return {
            "after": flat(ours, samples, seed),
            "before": flat(theirs, samples, seed),
            "difference": differences(ours, theirs, samples, seed),
            **flat(whole, samples, seed),
        }

    parts = {"all": range(len(examples)), "rude": rude}
    return {
        "n": len(examples),
        "n_rude": len(rude),
        "samples": answers,
        **{part: compared(rows) for part, rows in parts.items() if rows},
    }


def _scores(
    examples: Sequence[Example],
    sampled: Sampled,
    toxicity: Callable[[Sequence[str]], Measures],
    answers: int,
) -> Measures:
    each = [example for example in examples for _ in range(answers)]
    scores = quality(sampled.texts, [one.outputs for one in each], [one.slots for one in each])
    scores |= toxicity(sampled.texts)
    if sampled.rewards is not None:
        scores["reward"] = mean(sampled.rewards)
    return merged({name: scores[name] for name in ALIGNMENT_SCORES if name in scores}, answers)


def _fall(before: Measure, after: Measure) -> Measure:
    """1 − after / before of two rates on the same examples; a sample with nothing before counts as no fall."""

    def score(sums: Array) -> Array:
        theirs, ours = ratio(sums[:, :2]), ratio(sums[:, 2:])
        return 1 - np.divide(ours, theirs, out=np.ones_like(ours), where=theirs > 0)

    return Measure(np.concatenate([before.statistics, after.statistics], axis=1), score)
