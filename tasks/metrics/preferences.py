"""How well scores agree with preferences: pairwise accuracy, calibration, and controls that know little.

A margin is the score of the preferred completion less that of the other; the model of Bradley & Terry (1952)
says that people prefer the first with the chance σ(margin).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.data.records import Comparisons
from tasks.metrics.bootstrap import Measure, ratio

Array = NDArray[np.float64]
BINS = 10


def margins(comparisons: Sequence[Comparisons], scores: Sequence[float]) -> Array:
    """The margin of each pair; `scores` are those of all completions, one prompt after the other."""
    found, start = [], 0
    for each in comparisons:
        found += [scores[start + better] - scores[start + worse] for better, worse in each.pairs]
        start += len(each.completions)
    return np.array(found)


def prompts_of(comparisons: Sequence[Comparisons]) -> NDArray[np.int64]:
    """The number of the prompt that each pair belongs to."""
    return np.repeat(np.arange(len(comparisons)), [len(each.pairs) for each in comparisons])


def accuracy(margin: Array, prompts: NDArray[np.int64]) -> Measure:
    """The share of pairs with a margin above 0, a margin of 0 counted half; resampled by prompt."""
    right = (margin > 0) + 0.5 * (margin == 0)
    return Measure(np.stack([np.bincount(prompts, right), np.bincount(prompts)], axis=1), ratio)


def by_kind(comparisons: Sequence[Comparisons], margin: Array) -> dict[str, tuple[float, int]]:
    """Accuracy, and number of pairs, where the other completion is of a kind and the label is not known to be
    wrong.
    """
    losers = [
        None if flip else each.kinds[worse]
        for each in comparisons
        for (_, worse), flip in zip(each.pairs, each.flipped, strict=True)
    ]
    found = {}
    for kind in sorted({kind for kind in losers if kind is not None}):
        chosen = margin[[loser == kind for loser in losers]]
        found[kind] = (float((chosen > 0).mean()), len(chosen))
    return found


def reliability(margin: Array) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, pairs) in each of ten equal ranges of confidence σ(|margin|) from ½ to 1."""
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        (
            float(confidence[place == at].mean()),
            float((margin[place == at] > 0).mean()),
            int((place == at).sum()),
        )
        for at in range(BINS)
        if (place == at).any()
    ]


def calibration_error(margin: Array) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy (arXiv 1706.04599 eq. 3)."""
    return sum(abs(sure - right) * pairs for sure, right, pairs in reliability(margin)) / len(margin)


def length_margins(train: Sequence[Comparisons], test: Sequence[Comparisons]) -> Array:
    """The margins that a logistic regression on the length in words alone gives to the test pairs."""
    return _linear_margins(_lengths(train), _lengths(test), train, test)


def word_margins(train: Sequence[Comparisons], test: Sequence[Comparisons]) -> Array:
    """The margins that a logistic regression on the words of the completions alone gives to the test pairs."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=r"[#\w]+")  # noqa: S106
    known = counter.fit_transform(_completions(train))
    return _linear_margins(known, counter.transform(_completions(test)), train, test)


def _linear_margins(
    known: Array, new: Array, train: Sequence[Comparisons], test: Sequence[Comparisons]
) -> Array:
    from scipy.sparse import csr_matrix, vstack
    from sklearn.linear_model import LogisticRegression

    better, worse = _places(train)
    difference = csr_matrix(known[better] - known[worse])
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(vstack([difference, -difference]), np.repeat([1, -1], len(better)))
    better, worse = _places(test)
    found: Array = model.decision_function(new[better] - new[worse])
    return found


def _lengths(comparisons: Sequence[Comparisons]) -> Array:
    return np.array([[float(len(text.split()))] for text in _completions(comparisons)])


def _completions(comparisons: Sequence[Comparisons]) -> list[str]:
    return [text for each in comparisons for text in each.completions]


def _places(comparisons: Sequence[Comparisons]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the preferred and the other completion of each pair stand among all completions."""
    starts = np.cumsum([0, *(len(each.completions) for each in comparisons[:-1])])
    pairs = [
        (start + one, start + other)
        for start, each in zip(starts, comparisons, strict=True)
        for one, other in each.pairs
    ]
    found = np.array(pairs)
    return found[:, 0], found[:, 1]
