"""Bootstrap intervals for any score that is a function of sums over examples (Efron, 1979; percentile method).

A `Measure` keeps, per example, the numbers that add up (a ROUGE score and a 1; n-gram counts for BLEU; right
and all mentions for slot-F1) and the function from their sums to the score. Resampling then is one matrix
product, for corpus scores as well as for means, and nothing is scored twice.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A score with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Measure(NamedTuple):
    """A score over N examples: `score` maps sums of `statistics` over examples, `[B, K]`, to `[B]`."""

    statistics: Array  # [N, K]
    score: Callable[[Array], Array]

    def of(self, draws: Array) -> Array:
        """Return the score `[B]` of B samples given as how often each example is drawn, `[B, N]`."""
        return self.score(draws @ self.statistics)

    @property
    def value(self) -> float:
        """The score over all examples, each once."""
        return float(self.score(self.statistics.sum(axis=0, keepdims=True))[0])


def ratio(sums: Array) -> Array:
    """Return first column over second, `[B]`; 0 where the second is 0."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] > 0)


def mean(scores: Array) -> Measure:
    """Return the mean of per-example scores `[N]` as a measure."""
    return Measure(np.stack([scores, np.ones_like(scores)], axis=1), ratio)


@lru_cache(maxsize=8)
def resamples(examples: int, samples: int, seed: int) -> Array:
    """Return how often each sample of N draws with replacement has each of the N examples: `[samples, N]`.

    The same numbers give the same samples, so that scores of one set of examples can be compared pairwise.
    """
    chance = np.full(examples, 1 / examples)
    return np.random.default_rng(seed).multinomial(examples, chance, size=samples).astype(np.float64)


def interval(measure: Measure, draws: Array) -> Interval:
    """Return the measure with its 95 % percentile interval over `draws` `[B, N]`."""
    return Interval(measure.value, *_ends(measure.of(draws)))


def difference(first: Measure, second: Measure, draws: Array) -> Interval:
    """Return first − second on the same examples, with the paired interval: both see the same samples."""
    return Interval(first.value - second.value, *_ends(first.of(draws) - second.of(draws)))


def _ends(scores: Array) -> tuple[float, float]:
    low, high = np.percentile(scores, (2.5, 97.5))
    return float(low), float(high)
