"""BLEU (Papineni et al., 2002) through sacrebleu, in 0…1, from counts that can be added up over examples."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ORDERS = 4


def counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return the n-gram statistics `[N, 10]` of N answers.

    Columns: words of the answer, words of the closest reference, correct 1…4-grams, all 1…4-grams.
    """
    from sacrebleu.metrics import BLEU

    sentence = BLEU(effective_order=True)  # changes the sentence's own score, which is not used, and no count
    rows = []
    for prediction, targets in zip(predictions, references, strict=True):
        score = sentence.sentence_score(prediction, list(targets))
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.float64).reshape(len(rows), 2 + 2 * ORDERS)


def bleu(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return corpus BLEU `[B]` of summed statistics `[B, 10]`, with sacrebleu's default smoothing (`exp`)."""
    from sacrebleu.metrics import BLEU

    scores = [
        BLEU.compute_bleu(row[2 : 2 + ORDERS], row[2 + ORDERS :], row[0], row[1], smooth_method="exp").score
        for row in sums.astype(np.int64).tolist()
    ]
    return np.minimum(np.array(scores) / 100, 1.0)  # a product of exact precisions may round to just above 1


def signature(references: Sequence[Sequence[str]]) -> str:
    """Return sacrebleu's signature, which says how the score was made and with which version."""
    from sacrebleu.metrics import BLEU

    most = max(len(targets) for targets in references)
    corpus = BLEU()
    streams = [[_nth(targets, n) for targets in references] for n in range(most)]
    corpus.corpus_score([""] * len(references), streams)
    return str(corpus.get_signature())


def _nth(targets: Sequence[str], n: int) -> str | None:
    return targets[n] if n < len(targets) else None
