"""Summaries that need no model: the first turn, the longest turn, the summary of the nearest training text."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


def lead_1(text: str) -> str:
    """Return the first turn (line) of a dialogue."""
    return _turns(text)[0]


def longest_turn(text: str) -> str:
    """Return the turn (line) with the most words, the first of several."""
    return max(_turns(text), key=lambda turn: len(turn.split()))


def nearest(texts: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return for each text the index of the most similar known text: cosine of TF-IDF weighted words.

    A word weighs (1 + ln count) · ln(known / known texts with the word). Of equally near texts the first wins.
    """
    vocabulary: dict[str, int] = {}
    terms, owners, counts = [], [], []
    for index, text in enumerate(known):
        for word, count in Counter(_words(text)).items():
            terms.append(vocabulary.setdefault(word, len(vocabulary)))
            owners.append(index)
            counts.append(count)

    by_term = np.argsort(terms, kind="stable")
    owner = np.array(owners, dtype=np.int64)[by_term]
    holders = np.bincount(terms, minlength=len(vocabulary))  # known texts with each word
    rarity = np.log(len(known) / np.maximum(holders, 1))
    weight = (1 + np.log(np.array(counts, dtype=np.float64)[by_term])) * np.repeat(rarity, holders)
    length = np.sqrt(np.bincount(owner, weights=weight**2, minlength=len(known)))
    length[length == 0] = 1
    start = np.concatenate([[0], np.cumsum(holders)])

    found = []
    for text in texts:
        products = np.zeros(len(known))
        for word, count in Counter(_words(text)).items():
            if word in vocabulary:
                term = vocabulary[word]
                rows = slice(start[term], start[term + 1])
                products[owner[rows]] += (1 + np.log(count)) * rarity[term] * weight[rows]
        found.append(int(np.argmax(products / length)))
    return found


def _turns(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()] or [""]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
