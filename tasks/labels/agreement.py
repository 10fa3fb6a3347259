"""How far labelers agree: Krippendorff's alpha.

K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), https://repository.upenn.edu/asc_papers/43.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from tasks.data.keys import key
from tasks.labels.journal import Judgement

Metric = Literal["nominal", "ordinal", "interval"]
Values = Mapping[str, float]  # labeler → value


def alpha(units: Sequence[Sequence[float]], metric: Metric) -> float | None:
    """Krippendorff's alpha of the values that several people gave each unit.

    1 is full agreement, 0 what chance gives. Units with fewer than two values do not count. None when nothing
    is left, or all values are equal: then chance agrees too.
    """
    counts = [Counter(unit) for unit in units if len(unit) > 1]
    total: Counter[float] = Counter()
    for counted in counts:
        total.update(counted)
    n = total.total()
    distance = _distance(metric, total)
    expected = sum(total[a] * total[b] * distance(a, b) for a, b in combinations(sorted(total), 2))
    if not expected:
        return None
    observed = sum(
        counted[a] * counted[b] * distance(a, b) / (counted.total() - 1)
        for counted in counts
        for a, b in combinations(sorted(counted), 2)
    )
    return 1.0 - (n - 1) * observed / expected


def _distance(metric: Metric, total: Mapping[float, int]) -> Callable[[float, float], float]:
    """The squared difference of two values a < b (section E of the paper)."""
    if metric == "nominal":
        return lambda a, b: 1.0
    if metric == "interval":
        return lambda a, b: (a - b) ** 2
    values = sorted(total)
    return lambda a, b: (
        (sum(total[value] for value in values if a <= value <= b) - (total[a] + total[b]) / 2) ** 2
    )


def preferences(judgements: Mapping[str, Judgement]) -> list[Values]:
    """What the labelers of one item say of each two answers: -1 the first is better, 1 the second, 0 neither.

    Which is the first depends on a hash, so that it says nothing. Who skipped the item says nothing.
    """
    levels = {
        labeler: dict(zip(judgement.completions, judgement.levels, strict=True))
        for labeler, judgement in judgements.items()
        if judgement.verdict != "skipped"
    }
    texts = sorted({text for level in levels.values() for text in level}, key=key)
    return [
        {
            labeler: float((level[one] > level[other]) - (level[one] < level[other]))
            for labeler, level in levels.items()
        }
        for one, other in combinations(texts, 2)
    ]


def report(journals: Mapping[str, Mapping[str, Judgement]]) -> dict[str, Any]:
    """Counts of each labeler, and the agreement of all and of each two on the pairs of answers that both saw.

    `alpha` is ordinal (the first better, neither, the second better); `same` is the plain share of equal
    verdicts.
    """
    items: dict[str, dict[str, Judgement]] = {}
    for labeler, held in journals.items():
        for name, judgement in held.items():
            items.setdefault(name, {})[labeler] = judgement
    pairs = [values for found in items.values() for values in preferences(found) if len(values) > 1]
    several = sum(
        sum(judgement.verdict != "skipped" for judgement in found.values()) > 1 for found in items.values()
    )
    return {
        "labelers": {labeler: _counts(held) for labeler, held in journals.items()},
        "items": len(items),
        "items_of_several": several,
        "all": _agreement(pairs),
        "between": [
            {"labelers": list(two), **_agreement([_only(values, two) for values in pairs])}
            for two in combinations(journals, 2)
        ],
    }


def _counts(held: Mapping[str, Judgement]) -> dict[str, int]:
    verdicts = Counter(judgement.verdict for judgement in held.values())
    return {
        "ranked": verdicts["ranked"],
        "all_bad": verdicts["all bad"],
        "skipped": verdicts["skipped"],
        "pairs": sum(len(judgement.pairs) for judgement in held.values()),
    }


def _only(values: Values, labelers: Sequence[str]) -> Values:
    return {labeler: values[labeler] for labeler in labelers if labeler in values}


def _agreement(pairs: Sequence[Values]) -> dict[str, Any]:
    units = [list(values.values()) for values in pairs if len(values) > 1]
    couples = [one == other for unit in units for one, other in combinations(unit, 2)]
    return {
        "pairs": len(units),
        "alpha": alpha(units, "ordinal"),
        "same": sum(couples) / len(couples) if couples else None,
    }
