"""Which rows of a corpus are used, and where: repeats out, splits, no leak, the mixture."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from tasks.data.corpus import Corpus
from tasks.data.duplicates import GOLDEN, Hashes, Mask, near_crossings, near_repeats, repeats
from tasks.data.splits import (
    TEST,
    TRAIN,
    UNPINNED,
    VALIDATION,
    Places,
    assign,
    mixture,
    shared_keys,
    torn_group,
)
from tasks.stage import DataError
from tasks.stage.progress import Bar

LEFT_OUT = -1
NAMED = 3  # examples in a message


@dataclass(frozen=True)
class Selection:
    """The place of each row [N] (a position in SPLITS, or -1), and why others are left out.

    `repeats` [N] and `near` (row, earlier row) are what was removed; `left_out` [N] fell to the mixture, or is
    raw text in the group of a held-out example.
    """

    places: Places
    repeats: Mask
    near: list[tuple[int, int]]
    left_out: Mask

    def counts(self, rows: NDArray[np.int64], splits: int) -> list[int]:
        """How many of the given rows [R] are in each of the first `splits` splits."""
        places = self.places[rows]
        return [int(number) for number in np.bincount(places[places >= 0], minlength=splits)]

    @property
    def near_mask(self) -> Mask:
        """Whether each row [N] was removed as a near repeat."""
        mask = np.zeros(len(self.places), dtype=bool)
        mask[[row for row, _ in self.near]] = True
        return mask


def select_examples(
    corpus: Corpus,
    fresh: Mask,
    *,
    exact: bool,
    near: float | None,
    validation: float,
    test: float,
    leakage: float | None,
    weights: Sequence[float | None],
    bar: Bar,
) -> Selection:
    """Choose and place the examples among the `fresh` rows [N].

    `near` and `leakage` are thresholds of resemblance, `weights` those of the sources; `bar` counts bands.
    Raises DataError when the pins tear a group, a test text is in train too, or nothing is left to train on.
    """
    rows = corpus.rows
    if torn := torn_group(rows["group"], rows["pin"]):
        one, other = (corpus.record(row) for row in torn)
        raise DataError(
            f"{one['id']} is pinned to {one['split']} and {other['id']} to {other['split']}, but both are in "
            f"group {one['group']}, which cannot be divided; pin both alike, or map another column to group"
        )
    repeated, near_pairs, kept = _unique(corpus, fresh, exact=exact, near=near, bar=bar)
    places = np.where(kept, assign(rows["group"], rows["pin"], validation, test), LEFT_OUT).astype(np.int8)
    _refuse_leaks(corpus, places, leakage, bar)
    trained = np.flatnonzero(places == TRAIN)
    left_out = np.zeros(len(rows), dtype=bool)
    left_out[trained] = ~mixture(rows["source"][trained], rows["content"][trained], weights)
    places[left_out] = LEFT_OUT
    if not (places == TRAIN).any():
        raise DataError(
            f"none of {len(rows):,} examples is in train: see prepare.splits and the sources' split"
        )
    return Selection(places, repeated, near_pairs, left_out)


def select_text(
    corpus: Corpus, *, exact: bool, near: float | None, validation: float, held_out: Hashes, bar: Bar
) -> Selection:
    """Choose and place the documents; the thresholds and `bar` are as for examples.

    Those whose group is in `held_out` [G] (groups of examples that no model may have read) are left out.
    """
    every = np.ones(len(corpus), dtype=bool)
    repeated, near_pairs, kept = _unique(corpus, every, exact=exact, near=near, bar=bar)
    groups = corpus.rows["group"]
    left_out = kept & np.isin(groups, held_out)
    # mixed again: the groups that the hash puts first are the held-out ones, and gone
    places = assign(groups * GOLDEN, np.full(len(groups), UNPINNED, dtype=np.int8), validation, 0.0)
    places[~kept | left_out] = LEFT_OUT
    return Selection(places, repeated, near_pairs, left_out)


def held_out_groups(corpus: Corpus, selection: Selection) -> Hashes:
    """The groups of the validation and test examples."""
    groups: Hashes = np.unique(corpus.rows["group"][np.isin(selection.places, (VALIDATION, TEST))])
    return groups


def _unique(
    corpus: Corpus, fresh: Mask, *, exact: bool, near: float | None, bar: Bar
) -> tuple[Mask, list[tuple[int, int]], Mask]:
    """Exact repeats [N], near repeats with the row that stays, and the rows that are kept [N]."""
    repeated = np.zeros(len(corpus), dtype=bool)
    if exact:
        repeated[fresh] = repeats(corpus.rows["content"][fresh])
    kept = fresh & ~repeated
    pairs: list[tuple[int, int]] = []
    if near is not None and corpus.signatures is not None:
        pairs = near_repeats(
            corpus.signatures, corpus.rows["scope"], kept, near, corpus.resemblance, bar.advance
        )
        kept = kept.copy()
        kept[[row for row, _ in pairs]] = False
    return repeated, pairs, kept


def _refuse_leaks(corpus: Corpus, places: Places, threshold: float | None, bar: Bar) -> None:
    """Raise DataError when a test row's text, or by `threshold` one that nearly says the same, is in train."""
    test, train = places == TEST, places == TRAIN
    same = shared_keys(corpus.rows["text"], test, train)
    if same:
        raise DataError(_leak(corpus, same, f"{len(same)} texts are in test and in train"))
    if threshold is None or corpus.signatures is None:
        return
    crossings = near_crossings(corpus.signatures, test, train, threshold, corpus.resemblance, bar.advance)
    if near := list(islice(crossings, NAMED)):
        raise DataError(_leak(corpus, near, f"texts in test are near texts in train (at least {threshold})"))


def _leak(corpus: Corpus, pairs: Sequence[tuple[int, int]], what: str) -> str:
    named = ", ".join(
        f"{corpus.record(one)['id']} = {corpus.record(other)['id']}" for one, other in pairs[:NAMED]
    )
    return f"leak: {what}: {named}; give them one group (columns.group), or lower prepare.deduplicate.near"
