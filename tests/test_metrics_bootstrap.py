"""Intervals: coverage, agreement with a plain loop, pairing, seeds."""

import math

import numpy as np
import pytest

from tasks.metrics import bleu
from tasks.metrics.bootstrap import Measure, difference, interval, mean, ratio, resamples
from tasks.metrics.measures import flat, perplexity, quality, subset, toxicity
from tasks.metrics.toxicity import oracle


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        found = interval(mean(generator.exponential(size=80)), resamples(80, 400, seed=trial))
        covered += found.low <= 1.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_each_sample_draws_as_many_examples_as_there_are() -> None:
    draws = resamples(37, 50, seed=1)
    assert draws.shape == (50, 37)
    assert (draws.sum(axis=1) == 37).all()
    assert np.array_equal(draws, resamples(37, 50, seed=1))
    assert not np.array_equal(draws, resamples(37, 50, seed=2))


def test_resampled_corpus_scores_equal_scoring_the_sample_again() -> None:
    from sacrebleu.metrics import BLEU

    predictions = ["the cat sat on the mat", "a dog ran in the park today", "rain fell on the old town"]
    references = ["the cat sat on a mat", "the dog ran in the park", "rain falls on the old town again"]
    measure = Measure(bleu.counts(predictions, [[text] for text in references]), bleu.bleu)
    draws = resamples(3, 20, seed=3)
    for row, score in zip(draws.astype(int), measure.of(draws), strict=True):
        again = [index for index, times in enumerate(row) for _ in range(times)]
        expected = (
            BLEU().corpus_score([predictions[i] for i in again], [[references[i] for i in again]]).score / 100
        )
        assert score == pytest.approx(expected, abs=1e-12)


def test_a_paired_difference_is_far_narrower_than_its_two_intervals() -> None:
    generator = np.random.default_rng(5)
    first = generator.normal(size=200)
    second = first - 0.1 + generator.normal(scale=0.01, size=200)
    draws = resamples(200, 1000, seed=0)
    found = difference(mean(first), mean(second), draws)
    assert found.low < 0.1 < found.high
    alone = interval(mean(first), draws)
    assert found.high - found.low < (alone.high - alone.low) / 20


def test_a_score_minus_itself_is_nothing() -> None:
    measure = mean(np.random.default_rng(1).normal(size=30))
    assert difference(measure, measure, resamples(30, 100, seed=0)) == (0, 0, 0)


def test_a_ratio_with_nothing_below_is_zero() -> None:
    assert ratio(np.array([[0.0, 0.0], [1.0, 2.0]])).tolist() == [0, 0.5]


def test_perplexity_counts_every_token_once() -> None:
    measure = perplexity(np.array([2.0, 9.0]), np.array([1.0, 9.0]))
    assert measure.value == pytest.approx(math.exp(11 / 10))


def test_flat_numbers_of_a_set_and_of_a_part_of_it() -> None:
    predictions = ["Ann, that fool, comes", "Ben comes", "nobody"]
    references = [["Ann comes"], ["Ben comes"], ["Cal comes"]]
    slots = [{"who": "Ann"}, {"who": "Ben"}, {"who": "Cal"}]
    scores = quality(predictions, references, slots) | toxicity(oracle(predictions), toxic_from=0.5)
    numbers = flat(scores, samples=100, seed=0)
    names = {name.removesuffix("_low").removesuffix("_high") for name in numbers}
    assert names == {
        *("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "exact_match", "slot_f1"),
        *("toxicity_rate", "toxicity_mean", "length_ratio"),
    }
    assert all(numbers[f"{name}_low"] <= numbers[name] <= numbers[f"{name}_high"] for name in names)
    assert numbers["toxicity_rate"] == numbers["exact_match"] == 0.333333
    assert numbers["slot_f1"] == 0.8
    assert numbers["length_ratio"] == 1.166667
    part = subset(scores, [1])
    assert part["exact_match"].value == part["slot_f1"].value == part["rougeL"].value == 1


def test_examples_without_slots_have_no_slot_f1() -> None:
    assert "slot_f1" not in quality(["a"], [["a"]], [{}])
