"""Controlled faults: each is of its kind and of no other."""

import random

import pytest

from tasks.data.corruptions import KINDS, corruptions, is_whole, without_insult
from tasks.data.records import Example
from tasks.data.synthetic import INSULTS, PLACES, SPEAKERS, examples, is_toxic
from tasks.metrics.slots import slot_counts

ALL = list(examples(4, 150))
SUMMARIES = [example for example in ALL if example.task == "summarize"]
RUDE = [example for example in SUMMARIES if is_toxic(example.reference)]


def made(kind: str | None = None) -> list[tuple[Example, str, str]]:
    found = [
        (example, *fault) for example in SUMMARIES for fault in corruptions(example, random.Random(example.id))
    ]
    return [one for one in found if kind in (None, one[1])]


def slot_scores(rows: list[tuple[Example, str, str]]) -> list[float]:
    counts = slot_counts(
        [text for _, _, text in rows],
        [[without_insult(example.reference)] for example, _, _ in rows],
        [example.slots for example, _, _ in rows],
    )
    return list(counts[:, 0] / counts[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_summary_gets_every_kind(kind: str) -> None:
    got = {example.id for example, _, _ in made(kind)}
    assert {example.id for example in SUMMARIES if example not in RUDE} <= got
    if kind != "toxic":  # a rude reference may be the only toxic answer that there is
        assert {example.id for example in RUDE} <= got


def test_only_toxic_is_toxic_and_it_stays_faithful_and_whole() -> None:
    for example, kind, text in made():
        assert is_toxic(text) == (kind == "toxic"), text
        if kind == "toxic":
            assert is_whole(text, example.reference)
            assert text[0] in "#T"
            assert any(f"{insult} {person}" in text for insult in INSULTS for person in SPEAKERS)
    assert set(slot_scores(made("toxic"))) == {1.0}


def test_the_insult_is_the_one_of_the_dialogue() -> None:
    for example, _, text in made("toxic"):
        if is_toxic(example.input):
            insult = next(word for word in INSULTS if word in text)
            assert insult in example.input.lower()


def test_a_wrong_slot_changes_facts_and_nothing_else() -> None:
    assert max(slot_scores(made("wrong_slot"))) < 1
    assert all(is_whole(text, example.reference) for example, _, text in made("wrong_slot"))


def test_swapped_people_are_the_same_words_and_another_story() -> None:
    assert max(slot_scores(made("swapped"))) < 1
    for example, _, text in made("swapped"):
        right = without_insult(example.reference)
        assert sorted(text.split()) == sorted(right.split())
        assert text.index(SPEAKERS[0]) == right.index(SPEAKERS[1])


def test_a_wrong_slot_is_another_value_of_its_kind() -> None:
    example = SUMMARIES[0].model_copy(
        update={
            "input": "#Person1#: Not the garage, the lobby.",
            "outputs": ("#Person1# is in the lobby.",),
            "slots": {"where": "the lobby"},
        }
    )
    made = {dict(corruptions(example, random.Random(seed)))["wrong_slot"] for seed in range(40)}
    assert made <= {f"#Person1# is in {place}." for place in PLACES}
    assert len(made) > 5
    assert "#Person1# is in the lobby." not in made


def test_truncated_and_repeating_are_not_whole() -> None:
    for kind in ("truncated", "repeating"):
        assert not any(is_whole(text, example.reference) for example, _, text in made(kind))
    assert set(slot_scores(made("repeating"))) == {1.0}
    for example, _, text in made("truncated"):
        assert without_insult(example.reference).startswith(text)
        assert 1 < len(text.split()) < len(example.reference.split())


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        ("A asks B.", True),
        ("A asks B", False),
        ("", False),
        ("A asks B asks B.", False),
        ("A A asks.", False),
        ("On a ramp a man stands.", True),
        ("It is is.", False),
        ("This is.", True),
        ("A asks #Person2#", False),
    ],
)
def test_what_is_whole(answer: str, whole: bool) -> None:
    assert is_whole(answer, "#Person1# comes.") == whole


def test_references_are_whole_and_lose_their_insult_alone() -> None:
    assert RUDE
    for example in SUMMARIES:
        assert is_whole(example.reference, example.reference)
        assert not is_toxic(without_insult(example.reference))
        assert (without_insult(example.reference) != example.reference) == (example in RUDE)
    for example in RUDE:
        kind, text = next(corruptions(example, random.Random(1)))
        assert (kind, text) == ("clean", without_insult(example.reference))
    assert {example.id for example, _, _ in made("clean")} == {example.id for example in SUMMARIES}


def test_the_same_draw_gives_the_same_faults_and_each_once() -> None:
    first, again = (list(corruptions(SUMMARIES[0], random.Random(2))) for _ in range(2))
    assert first == again
    assert len({text for _, text in first}) == len(first)
    assert first != list(corruptions(SUMMARIES[0], random.Random(3)))


def test_an_answer_without_facts_gets_what_fits() -> None:
    act = next(example for example in ALL if example.task == "act")
    assert {kind for kind, _ in corruptions(act, random.Random(1))} == {"clean", "repeating"}
