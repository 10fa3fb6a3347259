"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum per example, with stemming (Lin, 2004; the `rouge_score` package).

F-measures in 0…1: precision divides by the n-grams of the answer, recall by those of the reference. Of
several references the best one counts. ROUGE-Lsum takes each line as a sentence. `rouge_score` spends most of
its time in the Porter stemmer, so every word is stemmed once.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class StemmedWords:
    """`rouge_score`'s own tokenizer with its stemmer on, remembering what it made of each word."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.tokens_of_word = cache(DefaultTokenizer(use_stemmer=True).tokenize)

    def tokenize(self, text: str) -> list[str]:
        """Return the stemmed words of `text`."""
        return [token for word in text.split() for token in self.tokens_of_word(word)]


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float64]]:
    """Return the F-measure `[N]` of each of `NAMES` for N answers, each with one or more references."""
    scorer = _scorer()
    rows = [
        [scores[name].fmeasure for name in NAMES]
        for prediction, targets in zip(predictions, references, strict=True)
        for scores in [scorer.score_multi(targets, prediction)]
    ]
    return dict(zip(NAMES, np.array(rows, dtype=np.float64).reshape(len(rows), len(NAMES)).T, strict=True))


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(NAMES, tokenizer=StemmedWords())
