"""From answers to preferences: who ranks them, and which of two answers was preferred.

K answers give up to K·(K − 1)/2 pairs (arXiv 2203.02155 §3.5), one for each two that are not ranked equal.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import Protocol

from tasks.data.corruptions import corruptions, is_whole, without_insult
from tasks.data.records import Comparisons, Example, Ranking
from tasks.data.synthetic import is_toxic


class Ranker(Protocol):
    """Who ranks: a person, a rule, or a model as judge."""

    def __call__(self, examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return what each of the answers to each example is worth to the ranker; equal ones are ties."""


def corpus_oracle(examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """The ranker of the synthetic corpus: clean before toxic, whole before broken, right before wrong.

    The first of the three that tells two answers apart decides. An answer is right when all its slots are
    (slot-F1 of 1).
    """
    from tasks.metrics.slots import slot_counts

    flat = [(example, answer) for example, some in zip(examples, answers, strict=True) for answer in some]
    counts = slot_counts(
        [answer for _, answer in flat],
        [[without_insult(example.reference)] for example, _ in flat],
        [example.slots for example, _ in flat],
    )
    worth = iter(
        4.0 * (not is_toxic(answer)) + 2 * is_whole(answer, example.reference) + (twice_right == both)
        for (example, answer), (twice_right, both) in zip(flat, counts, strict=True)
    )
    return [list(islice(worth, len(some))) for some in answers]


def completions(
    example: Example, answers: Sequence[str], wanted: int, draw: random.Random
) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of distinct completions: the answers, topped up with controlled faults to `wanted`.

    The kind of an answer is `answer`, that of a fault as in `corruptions`; a text that is both is a fault.
    """
    faults = list(corruptions(example, draw))
    kind_of = {text: kind for kind, text in faults}
    given = list(dict.fromkeys(filter(None, answers)))
    yield from ((kind_of.get(answer, "answer"), answer) for answer in given)
    missing = (fault for fault in faults if fault[1] not in given)
    yield from islice(missing, max(wanted - len(given), 0))


def compared(
    example: Example, made: Sequence[tuple[str, str]], worth: Sequence[float], flips: float, draw: random.Random
) -> Comparisons | None:
    """All pairs of the completions (kind, text) that are not worth the same; None when there is no such pair.

    Each pair is the wrong way round with the chance `flips`, as people sometimes have it.
    """
    both_ways = combinations(range(len(made)), 2)
    right = [(i, j) if worth[i] > worth[j] else (j, i) for i, j in both_ways if worth[i] != worth[j]]
    if not right:
        return None
    flipped = tuple(draw.random() < flips for _ in right)
    return Comparisons(
        id=example.id,
        prompt=example.prompt,
        completions=tuple(text for _, text in made),
        kinds=tuple(kind for kind, _ in made),
        pairs=tuple((j, i) if flip else (i, j) for (i, j), flip in zip(right, flipped, strict=True)),
        flipped=flipped,
        reference=example.reference,
        group=example.group,
    )


def as_ranked(ranking: Ranking, name: str) -> Comparisons | None:
    """The pairs of a ranking that somebody made; None when everything in it is tied."""
    place: dict[str, int] = {}
    for text in ranking.completions:
        place.setdefault(text, len(place))
    found = {
        (place[ranking.completions[better]], place[ranking.completions[worse]])
        for better, worse in ranking.pairs
    }
    if not found:
        return None
    two = len(place) == 2
    return Comparisons(
        id=name,
        prompt=ranking.prompt,
        completions=tuple(place),
        kinds=("chosen", "rejected") if two else ("ranked",) * len(place),
        pairs=tuple(sorted(found)),
        flipped=(False,) * len(found),
        reference=None,
        group=ranking.group,
    )
