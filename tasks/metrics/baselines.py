"""Summaries that need no model: the first turn, the longest turn, the summary of the nearest training text."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from tasks.metrics.rouge import StemmedWords


def lead_1(text: str) -> str:
    """Return the first turn (line) of a dialogue."""
    return _turns(text)[0]


def longest_turn(text: str) -> str:
    """Return the turn (line) with the most words, the first of several."""
    return max(_turns(text), key=lambda turn: len(turn.split()))


def nearest(texts: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return for each text the index of the most similar known text: cosine of TF-IDF weighted stems.

    Weights are (1 + ln count) · ln(known / known texts with the stem); of equally near texts the first wins.
    """
    words = StemmedWords()
    lists: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, text in enumerate(known):
        for stem, count in Counter(words.tokenize(text)).items():
            lists[stem].append((index, count))

    rarity = {stem: math.log(len(known) / len(rows)) for stem, rows in lists.items()}
    squares = np.zeros(len(known))
    postings = {}
    for stem, rows in lists.items():
        indices, counts = np.array(rows).T
        weights = (1 + np.log(counts)) * rarity[stem]
        squares[indices] += weights**2
        postings[stem] = indices, weights
    lengths = np.sqrt(np.where(squares > 0, squares, 1))

    found = []
    for text in texts:
        products = np.zeros(len(known))
        for stem, count in Counter(words.tokenize(text)).items():
            if stem in postings:
                indices, weights = postings[stem]
                products[indices] += (1 + math.log(count)) * rarity[stem] * weights
        found.append(int(np.argmax(products / lengths)))
    return found


def _turns(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()] or [""]
