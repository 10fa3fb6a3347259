"""The scores of a set of answers: as measures that can be resampled, and as flat numbers with intervals."""

from collections.abc import Mapping, Sequence

import numpy as np

from tasks.metrics.bleu import bleu, counts
from tasks.metrics.bootstrap import Array, Interval, Measure, difference, interval, mean, ratio, resamples
from tasks.metrics.exact_match import exact_match
from tasks.metrics.rouge import rouge
from tasks.metrics.slots import slot_counts
from tasks.metrics.surface import lengths

Measures = dict[str, Measure]


def quality(
    predictions: Sequence[str], references: Sequence[Sequence[str]], slots: Sequence[Mapping[str, str]]
) -> Measures:
    """Return the scores of N answers against their references; `slot_f1` only where any example has slots."""
    scores = {name: mean(values) for name, values in rouge(predictions, references).items()}
    scores["bleu"] = Measure(counts(predictions, references), bleu)
    scores["exact_match"] = mean(exact_match(predictions, references))
    if any(slots):
        scores["slot_f1"] = Measure(slot_counts(predictions, references, slots), ratio)
    scores["length_ratio"] = Measure(lengths(predictions, references), ratio)
    return scores


def toxicity(chances: Array, toxic_from: float) -> Measures:
    """Return the share of toxic answers and the mean chance of it, from each answer's chance `[N]`."""
    return {
        "toxicity_rate": mean((chances >= toxic_from).astype(np.float64)),
        "toxicity_mean": mean(chances),
    }


def perplexity(nll: Array, tokens: Array) -> Measure:
    """Return exp(negative log-likelihood per token) from the sum and the tokens of each example, both `[N]`."""
    return Measure(np.stack([nll, tokens], axis=1), lambda sums: np.exp(ratio(sums)))


def subset(scores: Mapping[str, Measure], rows: Sequence[int]) -> Measures:
    """Return the same measures over the examples at `rows`."""
    return {name: Measure(measure.statistics[list(rows)], measure.score) for name, measure in scores.items()}


def merged(scores: Mapping[str, Measure], size: int) -> Measures:
    """Return the same measures with each `size` examples in a row as one, which is drawn or not as a whole."""
    return {
        name: Measure(
            measure.statistics.reshape(-1, size, measure.statistics.shape[1]).sum(axis=1), measure.score
        )
        for name, measure in scores.items()
    }


def flat(scores: Mapping[str, Measure], samples: int, seed: int) -> dict[str, float]:
    """Return `NAME`, `NAME_low` and `NAME_high` (95 %) of each measure, rounded to six digits."""
    found = {
        name: interval(measure, resamples(len(measure.statistics), samples, seed))
        for name, measure in scores.items()
    }
    return _rounded(found)


def differences(
    ours: Mapping[str, Measure], theirs: Mapping[str, Measure], samples: int, seed: int
) -> dict[str, float]:
    """Return ours − theirs like `flat`, with paired intervals, for each of our measures."""
    found = {
        name: difference(measure, theirs[name], resamples(len(measure.statistics), samples, seed))
        for name, measure in ours.items()
    }
    return _rounded(found)


def _rounded(intervals: Mapping[str, Interval]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, (value, low, high) in intervals.items():
        numbers |= {name: round(value, 6), f"{name}_low": round(low, 6), f"{name}_high": round(high, 6)}
    return numbers
