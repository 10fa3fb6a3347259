"""ROUGE, BLEU, exact match, length and variety against their packages, plain formulas and their laws."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.metrics import bleu
from tasks.metrics.exact_match import exact_match
from tasks.metrics.rouge import NAMES, rouge
from tasks.metrics.surface import distinct_2, lengths

WORDS = st.sampled_from(
    ("the", "cat", "sits", "sitting", "mats", "running", "tables,", "Ben's", "no.", "7", "cafés")
)
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)
FULL_TEXTS = st.lists(WORDS, min_size=4, max_size=12).map(" ".join)
PAIRS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=6)


def corpus_bleu(predictions: list[str], references: list[list[str]]) -> float:
    return float(bleu.bleu(bleu.counts(predictions, references).sum(axis=0, keepdims=True))[0])


def test_rouge_of_the_published_example() -> None:
    scores = rouge(["testing one two"], [["testing one"]])
    assert {name: round(float(values[0]), 3) for name, values in scores.items()} == {
        "rouge1": 0.8,
        "rouge2": 0.667,
        "rougeL": 0.8,
        "rougeLsum": 0.8,
    }


def test_rouge_1_does_not_see_what_not_means() -> None:
    answers = ["It is very cold outside", "It is not cold outside"]
    scores = rouge(answers, [["It is cold outside"]] * 2)["rouge1"]
    assert scores.round(3).tolist() == [0.889, 0.889]


@settings(deadline=None)
@given(PAIRS)
def test_rouge_equals_the_package_without_our_cache(pairs: list[tuple[str, list[str]]]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    predictions, references = zip(*pairs, strict=True)
    plain = RougeScorer(NAMES, use_stemmer=True)
    expected = [plain.score_multi(targets, prediction) for prediction, targets in pairs]
    for name, values in rouge(predictions, references).items():
        assert values.tolist() == [scores[name].fmeasure for scores in expected]


def test_rouge_lsum_takes_each_line_as_a_sentence() -> None:
    scores = rouge(["second part\nfirst part"], [["first part\nsecond part"]])
    assert scores["rougeLsum"][0] == 1
    assert scores["rougeL"][0] < 1


def test_the_best_of_several_references_counts() -> None:
    assert rouge(["a b c"], [["x y", "a b c"]])["rougeL"].tolist() == [1]
    assert exact_match(["a b c"], [["x y", "a b c"]]).tolist() == [1]


@settings(deadline=None)
@given(PAIRS)
def test_bleu_equals_sacrebleu(pairs: list[tuple[str, list[str]]]) -> None:
    from sacrebleu.metrics import BLEU

    predictions, references = (list(column) for column in zip(*pairs, strict=True))
    streams = [[targets[n] if n < len(targets) else None for targets in references] for n in range(3)]
    expected = BLEU().corpus_score(
        predictions, [stream for stream in streams if any(x is not None for x in stream)]
    )
    assert corpus_bleu(predictions, references) == pytest.approx(min(expected.score / 100, 1), abs=1e-12)


def test_bleu_keeps_the_signature() -> None:
    fixed = bleu.signature([["a"], ["b"]])
    assert fixed.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")
    assert bleu.signature([["a"], ["b", "c"]]).startswith("nrefs:var|")


@settings(deadline=None)
@given(st.lists(FULL_TEXTS, min_size=1, max_size=5))
def test_a_copy_of_the_reference_scores_one(texts: list[str]) -> None:
    references = [[text] for text in texts]
    assert all((values == 1).all() for values in rouge(texts, references).values())
    assert corpus_bleu(texts, references) == pytest.approx(1)
    assert (exact_match(texts, references) == 1).all()
    words = lengths(texts, references)
    assert (words[:, 0] == words[:, 1]).all()


@settings(deadline=None)
@given(PAIRS, st.integers())
def test_scores_are_in_bounds_and_do_not_depend_on_order(pairs: list[tuple[str, list[str]]], seed: int) -> None:
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    predictions, references = (list(column) for column in zip(*pairs, strict=True))
    shuffled = [predictions[row] for row in order], [references[row] for row in order]
    for values, again in zip(rouge(predictions, references).values(), rouge(*shuffled).values(), strict=True):
        assert ((values >= 0) & (values <= 1)).all()
        assert again.tolist() == values[order].tolist()
    assert 0 <= corpus_bleu(predictions, references) == corpus_bleu(*shuffled) <= 1
    assert 0 <= distinct_2(predictions) == distinct_2(shuffled[0]) <= 1


def test_exact_match_minds_case_and_punctuation_but_not_white_space() -> None:
    answers = ["Monday  morning\n", "monday morning", "Monday morning."]
    assert exact_match(answers, [["Monday morning"]] * 3).tolist() == [1, 0, 0]


def test_length_counts_words_and_variety_counts_pairs() -> None:
    assert lengths(["a b c", ""], [["a b"], ["c d e"]]).tolist() == [[3, 2], [0, 3]]
    assert distinct_2(["a b c", "a b d"]) == 3 / 4
    assert distinct_2(["a", ""]) == 0


@pytest.mark.real_data
def test_rouge_of_the_lead_on_dialogsum_is_what_the_package_says(real_data: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    with (real_data / "dialogsum" / "dev.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:100]
    leads = [row["dialogue"].splitlines()[0] for row in rows]
    plain = RougeScorer(["rougeL"], use_stemmer=True)
    expected = np.mean(
        [plain.score(row["summary"], lead)["rougeL"].fmeasure for row, lead in zip(rows, leads, strict=True)]
    )
    assert rouge(leads, [[row["summary"]] for row in rows])["rougeL"].mean() == pytest.approx(
        expected, abs=1e-12
    )
    assert 0.05 < expected < 0.5
