"""Which row goes where: splits by the hash of the group, and the mixture of sources.

A row's place depends on its own group alone, so adding rows moves no old one. A pin moves its whole group.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.data.duplicates import Hashes, Mask
from tasks.data.records import SPLITS

TRAIN, VALIDATION, TEST = range(len(SPLITS))
UNPINNED = -1

Places = NDArray[np.int8]


def assign(groups: Hashes, pins: Places, validation: float, test: float) -> Places:
    """The split of each of N rows, as a position in `records.SPLITS`.

    `groups` [N] are hashes, `pins` [N] splits or -1; `validation` and `test` are shares of all groups. A group
    with a pinned row goes whole where the pin says.
    """
    units = groups / 2.0**64
    places = np.select([units < test, units < test + validation], [TEST, VALIDATION], TRAIN).astype(np.int8)
    pinned = pins != UNPINNED
    known, first = np.unique(groups[pinned], return_index=True)
    if not len(known):
        return places
    at = np.minimum(np.searchsorted(known, groups), len(known) - 1)
    follows = known[at] == groups
    places[follows] = pins[pinned][first][at[follows]]
    return places


def torn_group(groups: Hashes, pins: Places) -> tuple[int, int] | None:
    """Two rows of one group that are pinned to different splits, or None."""
    pinned = np.flatnonzero(pins != UNPINNED)
    order = pinned[np.argsort(groups[pinned], kind="stable")]
    torn = (groups[order[1:]] == groups[order[:-1]]) & (pins[order[1:]] != pins[order[:-1]])
    if not torn.any():
        return None
    place = int(np.argmax(torn))
    return int(order[place]), int(order[place + 1])


def mixture(sources: NDArray[np.integer], keys: Hashes, weights: Sequence[float | None]) -> Mask:
    """Which of N rows stay when their sources are brought to the proportions of `weights`.

    `sources` [N] are positions in `weights`; rows of a source without a weight all stay. Of the others as many
    stay as the scarcest allows, each chosen by its own hash (`keys` [N]).
    """
    counts = np.bincount(sources, minlength=len(weights))
    per_weight = [count / weight for count, weight in zip(counts, weights, strict=True) if weight is not None]
    rates = np.ones(len(weights))
    for source, weight in enumerate(weights):
        if weight is not None and counts[source]:
            rates[source] = min(per_weight) * weight / counts[source]
    stays: Mask = keys / 2.0**64 < rates[sources]
    return stays


def shared_keys(keys: Hashes, left: Mask, right: Mask) -> list[tuple[int, int]]:
    """(left row, right row) for each row of the left side whose key [N] stands on the right side too."""
    ours, theirs = np.flatnonzero(left), np.flatnonzero(right)
    both, at_ours, at_theirs = np.intersect1d(keys[ours], keys[theirs], return_indices=True)
    return sorted(zip(ours[at_ours].tolist(), theirs[at_theirs].tolist(), strict=True)) if len(both) else []
