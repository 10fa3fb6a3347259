"""Slot-F1: did the answer get the facts right, and who did what to whom?

Every example has slots (name → value). The values of a slot over the whole evaluation set are its lexicon, and
an answer mentions a value when it contains it as a whole word or phrase, upper or lower case. A slot with a
lexicon of its own counts the values that the answer and the example share. Slots that share values (who, whom)
are *roles*: the first value that the answer mentions is compared with the first that the reference mentions,
the second with the second, so an answer that swaps two people gets neither. F1 is micro-averaged over the
examples: 2 · right / (mentioned + wanted).
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Slots = Mapping[str, str]


def slot_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]], slots: Sequence[Slots]
) -> NDArray[np.float64]:
    """Return `[N, 2]`: twice the right mentions, and mentioned plus wanted values. F1 is the ratio of the sums.

    An example without slots has nothing to check and gives two zeros. The first reference orders the roles.
    """
    lexicons = list(_lexicons(slots))
    counts = np.zeros((len(predictions), 2))
    for row, (prediction, targets, facts) in enumerate(zip(predictions, references, slots, strict=True)):
        if facts:
            for names, pattern in lexicons:
                values = {facts[name].lower() for name in names if name in facts}
                counts[row] += _right_and_all(pattern, len(names) > 1, values, prediction, targets[0])
    return counts


def _right_and_all(
    pattern: re.Pattern[str], roles: bool, values: set[str], prediction: str, reference: str
) -> tuple[int, int]:
    mentioned = _mentions(pattern, prediction)
    if roles:
        said = [value for value in _mentions(pattern, reference) if value in values]
        wanted = said + sorted(values.difference(said))
        right = sum(one == other for one, other in zip(mentioned, wanted, strict=False))
    else:
        right = len(values.intersection(mentioned))
    return 2 * right, len(mentioned) + len(values)


def _mentions(pattern: re.Pattern[str], text: str) -> list[str]:
    """The values in `text`, each once, in the order of their first mention."""
    return list(dict.fromkeys(pattern.findall(text.lower())))


def _lexicons(slots: Sequence[Slots]) -> Iterator[tuple[tuple[str, ...], re.Pattern[str]]]:
    """Yield slot names that share values, with the pattern that finds their values, the longest first."""
    groups: list[tuple[set[str], set[str]]] = []
    for name in sorted({name for facts in slots for name in facts}):
        names, values = {name}, {facts[name].lower() for facts in slots if name in facts}
        apart = []
        for group in groups:
            if group[1].isdisjoint(values):
                apart.append(group)
            else:
                names |= group[0]
                values |= group[1]
        groups = [*apart, (names, values)]
    for names, values in groups:
        longest_first = sorted(values, key=lambda value: (-len(value), value))
        alternatives = "|".join(re.escape(value) for value in longest_first)
        yield tuple(sorted(names)), re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")
