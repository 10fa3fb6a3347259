"""Exact and near repeats: signatures estimate the Jaccard index, and what they propose is checked."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.duplicates import near_crossings, near_repeats, repeats, resemblance, signatures
from tasks.data.keys import key, normalise


def words(count: int, seed: int) -> list[str]:
    return [f"w{random.Random(f'{seed}/{place}').randrange(10_000)}" for place in range(count)]


def altered(text: list[str], changes: int, seed: int) -> str:
    places = random.Random(seed).sample(range(len(text)), changes)
    return " ".join(f"new{seed}x{place}" if place in places else word for place, word in enumerate(text))


def test_texts_are_the_same_whatever_case_spacing_and_spelling_of_characters() -> None:
    assert normalise("  Straße\tCafe\u0301 \n ＡＢ ") == "strasse café ab"
    assert normalise("not ( True )") != normalise("not True")


@settings(deadline=None)
@given(st.lists(st.text(max_size=4), max_size=5), st.lists(st.text(max_size=4), max_size=5))
def test_keys_differ_where_the_parts_do(one: list[str], other: list[str]) -> None:
    if all("\0" not in part for part in one + other) and one and other:
        assert (key(*one) == key(*other)) == (one == other)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=50))
def test_repeats_are_all_but_the_first(numbers: list[int]) -> None:
    expected = [number in numbers[:place] for place, number in enumerate(numbers)]
    assert repeats(np.array(numbers, dtype=np.uint64)).tolist() == expected


def test_resemblance_is_the_jaccard_index_of_word_five_shingles() -> None:
    assert resemblance("a b c d e f", "a b c d e f") == 1
    assert resemblance("a b c d e f", "b c d e f g") == pytest.approx(1 / 3)  # abcde bcdef cdefg
    assert resemblance("a b", "a b") == 1
    assert resemblance("a b", "a c") == 0


def test_signatures_estimate_the_resemblance() -> None:
    base = words(200, 0)
    texts = [" ".join(base), *(altered(base, changes, changes) for changes in (1, 2, 4, 8, 16, 32))]
    found = signatures(texts)
    for text, signature in zip(texts, found, strict=True):
        estimate = float((signature == found[0]).mean())
        assert abs(estimate - resemblance(texts[0], text)) < 0.13  # three standard deviations at .5


@settings(deadline=None)
@given(st.lists(st.text(min_size=1).map(normalise).filter(bool), min_size=1, max_size=12))
def test_a_signature_does_not_depend_on_the_texts_beside_it(texts: list[str]) -> None:
    together = signatures(texts)
    assert all((signatures([text])[0] == row).all() for text, row in zip(texts, together, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_near_repeats_are_near_an_earlier_text_that_stays(data: st.DataObject) -> None:
    short = st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(" ".join)
    texts = data.draw(st.lists(short, min_size=1, max_size=30))
    scopes = np.array(
        data.draw(st.lists(st.integers(0, 1), min_size=len(texts), max_size=len(texts))), np.uint64
    )
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))))
    dropped = dict(
        near_repeats(
            signatures(texts), scopes, chosen, 0.6, lambda one, other: resemblance(texts[one], texts[other])
        )
    )
    for row, earlier in dropped.items():
        assert earlier < row and earlier not in dropped
        assert chosen[row] and chosen[earlier] and scopes[row] == scopes[earlier]
        assert resemblance(texts[row], texts[earlier]) >= 0.6
    seen = set()
    for place, text in enumerate(texts):
        if chosen[place]:
            assert ((text, scopes[place]) in seen) <= (place in dropped)  # a copy never stays
            seen.add((text, scopes[place]))


def test_near_repeats_are_found_among_many_others() -> None:
    texts = [" ".join(words(60, seed)) for seed in range(400)]
    copies = {400 + seed: seed for seed in range(0, 400, 4)}
    texts += [altered(words(60, seed), 1, seed) for seed in copies.values()]
    found = near_repeats(
        signatures(texts),
        np.zeros(len(texts), np.uint64),
        np.ones(len(texts), bool),
        0.8,
        lambda one, other: resemblance(texts[one], texts[other]),
    )
    assert [earlier for _, earlier in found] == list(copies.values())


def test_texts_just_below_the_threshold_stay() -> None:
    pairs = [(words(60, seed), altered(words(60, seed), 2, seed)) for seed in range(50)]
    texts = [text for base, other in pairs for text in (" ".join(base), other)]
    exact = {place: resemblance(texts[place - 1], texts[place]) for place in range(1, 100, 2)}
    found = near_repeats(
        signatures(texts),
        np.zeros(len(texts), np.uint64),
        np.ones(len(texts), bool),
        0.72,
        lambda one, other: resemblance(texts[one], texts[other]),
    )
    assert [row for row, _ in found] == [place for place, value in exact.items() if value >= 0.72]
    assert 0 < len(found) < 50


def test_what_is_near_a_removed_text_only_stays() -> None:
    long = words(70, 0)
    texts = [" ".join(long[start : start + 60]) for start in (0, 4, 8)]
    assert (
        resemblance(texts[0], texts[1])
        == resemblance(texts[1], texts[2])
        > 0.8
        > resemblance(texts[0], texts[2])
    )
    found = near_repeats(
        signatures(texts),
        np.zeros(3, np.uint64),
        np.ones(3, bool),
        0.8,
        lambda one, other: resemblance(texts[one], texts[other]),
    )
    assert found == [(1, 0)]


def test_crossings_are_near_pairs_of_the_two_sides_only() -> None:
    base = [words(60, seed) for seed in range(30)]
    texts = [" ".join(text) for text in base] + [altered(base[7], 1, 1), altered(base[9], 1, 2), "x y z"]
    left = np.zeros(len(texts), bool)
    left[[30, 32, 3]] = True
    right = ~left
    right[31] = False
    found = list(
        near_crossings(
            signatures(texts), left, right, 0.8, lambda one, other: resemblance(texts[one], texts[other])
        )
    )
    assert found == [(30, 7)]
