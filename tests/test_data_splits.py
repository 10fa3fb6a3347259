"""Splits by group, pins, leaks by key, and mixtures."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.keys import key
from tasks.data.splits import TEST, TRAIN, VALIDATION, assign, mixture, shared_keys, torn_group

names = st.lists(st.text(max_size=3), min_size=1, max_size=60)
shares = st.tuples(st.floats(0, 0.49), st.floats(0, 0.49))


def hashes(groups: list[str]) -> np.ndarray:
    return np.array([key(group) for group in groups], dtype=np.uint64)


def unpinned(groups: list[str]) -> np.ndarray:
    return np.full(len(groups), -1, dtype=np.int8)


@settings(deadline=None)
@given(names, names, shares)
def test_adding_rows_moves_no_old_row(old: list[str], new: list[str], held: tuple[float, float]) -> None:
    both = assign(hashes(new + old), unpinned(new + old), *held)
    assert both[len(new) :].tolist() == assign(hashes(old), unpinned(old), *held).tolist()


@settings(deadline=None)
@given(names, st.data(), shares)
def test_no_group_crosses_a_split_whatever_is_pinned(
    groups: list[str], data: st.DataObject, held: tuple[float, float]
) -> None:
    pin = {group: data.draw(st.sampled_from([-1, TRAIN, VALIDATION, TEST])) for group in sorted(set(groups))}
    pins = np.array([pin[group] if data.draw(st.booleans()) else -1 for group in groups], dtype=np.int8)
    places = assign(hashes(groups), pins, *held)
    assert len(set(zip(groups, places.tolist(), strict=True))) == len(set(groups))
    assert (places[pins >= 0] == pins[pins >= 0]).all()


def test_shares_are_met() -> None:
    groups = [str(number) for number in range(20_000)]
    counts = np.bincount(assign(hashes(groups), unpinned(groups), 0.1, 0.2), minlength=3)
    assert np.abs(counts / 20_000 - [0.7, 0.1, 0.2]).max() < 0.01


@settings(deadline=None)
@given(names, st.data())
def test_two_pins_in_one_group_are_found(groups: list[str], data: st.DataObject) -> None:
    pins = data.draw(st.lists(st.sampled_from([-1, 0, 2]), min_size=len(groups), max_size=len(groups)))
    torn = torn_group(hashes(groups), np.array(pins, dtype=np.int8))
    pairs = {
        (i, j)
        for i in range(len(groups))
        for j in range(len(groups))
        if groups[i] == groups[j] and {pins[i], pins[j]} == {0, 2}
    }
    assert torn in pairs if pairs else torn is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ltn")), min_size=1))
def test_shared_keys_are_those_of_both_sides(rows: list[tuple[int, str]]) -> None:
    keys = np.array([number for number, _ in rows], dtype=np.uint64)
    side = np.array([letter for _, letter in rows])
    found = shared_keys(keys, side == "l", side == "t")
    both = {number for number, letter in rows if letter == "l"} & {n for n, letter in rows if letter == "t"}
    assert {int(keys[one]) for one, _ in found} == both
    assert all(side[one] == "l" and side[other] == "t" and keys[one] == keys[other] for one, other in found)


def test_a_mixture_has_the_proportions_of_its_weights() -> None:
    sources = np.repeat([0, 1, 2], [10_000, 1_000, 500])
    keys = hashes([str(number) for number in range(len(sources))])
    kept = np.bincount(sources[mixture(sources, keys, [2.0, 1.0, None])])
    assert kept[1] == 1_000 and kept[2] == 500
    assert abs(kept[0] - 2_000) < 150
    assert mixture(sources, keys, [None, None, None]).all()


def test_a_mixture_keeps_what_it_kept_when_the_plentiful_source_grows() -> None:
    sources = np.repeat([0, 1], [5_000, 1_000])
    keys = hashes([str(number) for number in range(len(sources))])
    kept = mixture(sources, keys, [1.0, 1.0])
    more = mixture(np.append(sources, [0] * 1_000), np.append(keys, keys[:1_000] + np.uint64(1)), [1.0, 1.0])
    assert (kept[more[: len(kept)]]).all()
