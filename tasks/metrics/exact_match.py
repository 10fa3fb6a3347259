"""Exact match: the share of answers that equal one of their references, white space aside."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return 1 where the answer is one of its references, else 0: `[N]`. Case and punctuation count."""
    return np.array(
        [
            _words(prediction) in [_words(target) for target in targets]
            for prediction, targets in zip(predictions, references, strict=True)
        ],
        dtype=np.float64,
    )


def _words(text: str) -> list[str]:
    return text.split()
