"""What an answer looks like without asking whether it is right: its length and its variety."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def lengths(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return how many words each answer and its first reference have: `[N, 2]`."""
    return np.array(
        [
            (len(prediction.split()), len(targets[0].split()))
            for prediction, targets in zip(predictions, references, strict=True)
        ],
        dtype=np.float64,
    ).reshape(len(predictions), 2)


def distinct_2(predictions: Sequence[str]) -> float:
    """Return the share of distinct word pairs among all word pairs of the answers (Li et al., 2016), or 0."""
    pairs = [pair for prediction in predictions for pair in pairwise(prediction.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
