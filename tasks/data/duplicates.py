"""Texts that say the same: exact repeats by hash, near ones by MinHash and locality-sensitive hashing.

Broder, "On the resemblance and containment of documents" (1997): the resemblance of two texts is the Jaccard
index of their sets of word 5-shingles, and two signatures of minima agree in a position with that probability.
Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3: texts that share a band of 4 positions
are candidates; with 32 bands a pair of resemblance .5 is one with probability .87, a pair of .7 with .9998.

Whatever the signatures propose is decided by the exact index. A text meets the first and the previous text of
each bucket that it falls into, not all of them: this keeps crowded buckets linear.
"""

from collections.abc import Callable, Iterator, Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

WORDS = 5
BANDS = 32
ROWS_IN_BAND = 4
FUNCTIONS = BANDS * ROWS_IN_BAND
MARGIN = 0.12  # three standard deviations of an estimate from 128 positions: 3 * sqrt(.8 * .2 / 128)
PAIRS_AT_ONCE = 8192

Hashes = NDArray[np.uint64]
Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]
Signatures = NDArray[np.uint8]

_GENERATOR = np.random.default_rng(19970611)
_FACTORS = _GENERATOR.integers(2**32, size=FUNCTIONS, dtype=np.uint32) | np.uint32(1)
_TERMS = _GENERATOR.integers(2**32, size=FUNCTIONS, dtype=np.uint32)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LOW_BITS = np.uint64(32)
LOW = np.uint64(2**32 - 1)


def repeats(keys: Hashes) -> Mask:
    """Whether each of `keys` [N] stands at an earlier position too."""
    order = np.argsort(keys, kind="stable")
    repeated = np.zeros(len(keys), dtype=bool)
    repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return repeated


def signatures(texts: Sequence[str]) -> Signatures:
    """The MinHash signatures [N, 128] of N normalised texts, none of them empty; one byte a position."""
    shingles, starts = _shingles(texts)
    minima = np.empty((FUNCTIONS, len(texts)), dtype=np.uint32)
    permuted = np.empty_like(shingles)
    for function in range(FUNCTIONS):
        np.multiply(shingles, _FACTORS[function], out=permuted)
        np.add(permuted, _TERMS[function], out=permuted)
        np.minimum.reduceat(permuted, starts, out=minima[function])
    # the leading bits of a minimum are nearly always 0: mix all of them into the byte that is kept
    return np.ascontiguousarray(((_mixed(minima)) >> np.uint32(24)).astype(np.uint8).T)


def _shingles(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The hashes of all word 5-shingles of all texts [S], and where those of each text start [N].

    A text of fewer than five words is filled up and makes one shingle.
    """
    hashes: list[int] = []
    lengths = np.empty(len(texts), dtype=np.int64)
    for position, text in enumerate(texts):
        words = list(map(crc32, text.encode().split()))
        words.extend([0] * (WORDS - len(words)))
        lengths[position] = len(words)
        hashes += words
    words_of_all = np.array(hashes, dtype=np.uint32)
    last = len(words_of_all) - WORDS + 1
    shingles = np.zeros(last, dtype=np.uint32)
    for offset in range(WORDS):
        shingles = _mixed((shingles ^ words_of_all[offset : last + offset]) + np.uint32(offset))
    ends = np.cumsum(lengths)
    within = np.ones(len(words_of_all), dtype=bool)
    for offset in range(1, WORDS):
        within[ends - offset] = False
    counts = lengths - (WORDS - 1)
    return shingles[within[:last]], np.cumsum(counts) - counts


def _mixed(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The finaliser of MurmurHash3: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def resemblance(one: str, other: str) -> float:
    """The Jaccard index of the word 5-shingles of two normalised texts."""
    first, second = _shingle_set(one), _shingle_set(other)
    return len(first & second) / len(first | second)


def _shingle_set(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + WORDS]) for start in range(max(1, len(words) - WORDS + 1))}


def near_repeats(
    found: Signatures,
    scopes: Hashes,
    chosen: Mask,
    threshold: float,
    exact: Callable[[int, int], float],
    each_band: Callable[[], object] = lambda: None,
) -> list[tuple[int, int]]:
    """(position, earlier position) of each text that is near an earlier one that stays.

    Near means a resemblance of at least `threshold`. Of the N texts with signatures `found` [N, 128] those are
    compared that are `chosen` [N] and of one scope (`scopes` [N]). `exact` gives the resemblance of two texts;
    `each_band` is called BANDS times.
    """
    candidates = [
        _likely(found, pairs, threshold)
        for order, same in _buckets(found, scopes, chosen, each_band)
        for pairs in _chains(order, same)
    ]
    dropped: dict[int, int] = {}
    for later, earlier in _unique(candidates):
        if later not in dropped and earlier not in dropped and exact(later, earlier) >= threshold:
            dropped[later] = earlier
    return list(dropped.items())


def near_crossings(
    found: Signatures,
    left: Mask,
    right: Mask,
    threshold: float,
    exact: Callable[[int, int], float],
    each_band: Callable[[], object] = lambda: None,
) -> Iterator[tuple[int, int]]:
    """(left position, right position) of texts of two sides [N] whose resemblance is >= `threshold`, lazily.

    The other arguments are those of `near_repeats`.
    """
    scopes = np.zeros(len(found), dtype=np.uint64)
    candidates = [
        _likely(found, pairs, threshold)
        for order, same in _buckets(found, scopes, left | right, each_band)
        for pairs in _neighbours(order, same, left, right)
    ]
    return (pair for pair in _unique(candidates) if exact(*pair) >= threshold)


def _buckets(
    found: Signatures, scopes: Hashes, chosen: Mask, each_band: Callable[[], object]
) -> Iterator[tuple[Positions, Mask]]:
    """For each band: the C chosen positions sorted by bucket, then by position [C], and whether each shares the
    bucket of the one before it [C]."""
    positions = np.flatnonzero(chosen)
    scopes = scopes[positions]
    places = np.arange(len(positions), dtype=np.uint64)
    for band in range(0, FUNCTIONS, ROWS_IN_BAND):
        columns = np.ascontiguousarray(found[positions, band : band + ROWS_IN_BAND])
        buckets = (columns.view(np.uint32)[:, 0] + scopes) * GOLDEN
        # 32 bits of bucket above 32 bits of place: one plain sort puts both in order
        packed = (buckets >> LOW_BITS << LOW_BITS) | places
        packed.sort()
        same = np.zeros(len(packed), dtype=bool)
        same[1:] = packed[1:] >> LOW_BITS == packed[:-1] >> LOW_BITS
        yield positions[packed & LOW], same
        each_band()


def _chains(order: Positions, same: Mask) -> Iterator[Positions]:
    """Pairs [P, 2] (later, earlier): each text with the previous one in its bucket, and with the first."""
    places = np.flatnonzero(same)
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    yield np.stack([order[places], order[places - 1]], axis=1)
    beyond = places[starts[places] < places - 1]
    yield np.stack([order[beyond], order[starts[beyond]]], axis=1)


def _neighbours(order: Positions, same: Mask, left: Mask, right: Mask) -> Iterator[Positions]:
    """Pairs [P, 2] (left, right): each text of the left side with the nearest of the right in its bucket."""
    places = np.arange(len(order))
    starts = np.maximum.accumulate(np.where(same, 0, places))
    ends_here = np.append(~same[1:], True)[: len(order)]
    ends = np.minimum.accumulate(np.where(ends_here, places, len(order))[::-1])[::-1]
    of_left = np.flatnonzero(left[order])
    is_right = right[order]
    before = np.maximum.accumulate(np.where(is_right, places, -1))
    after = np.minimum.accumulate(np.where(is_right, places, len(order))[::-1])[::-1]
    for near, inside in (
        (before[of_left], before[of_left] >= starts[of_left]),
        (after[of_left], after[of_left] <= ends[of_left]),
    ):
        yield np.stack([order[of_left[inside]], order[near[inside]]], axis=1)


def _likely(found: Signatures, pairs: Positions, threshold: float) -> Positions:
    """Those of `pairs` [P, 2] whose signatures agree about as often as the threshold asks."""
    kept = []
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        some = pairs[start : start + PAIRS_AT_ONCE]
        agreement = (found[some[:, 0]] == found[some[:, 1]]).mean(axis=1)
        kept.append(some[agreement >= threshold - MARGIN])
    return np.concatenate(kept) if kept else pairs


def _unique(candidates: Sequence[Positions]) -> Iterator[tuple[int, int]]:
    """Each pair once, in order."""
    pairs = np.concatenate(candidates) if candidates else np.empty((0, 2), dtype=np.int64)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    previous = (-1, -1)
    for one, other in pairs.tolist():
        if (one, other) != previous:
            previous = (one, other)
            yield previous
