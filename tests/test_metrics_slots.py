"""Slot-F1: facts, roles, lexicons."""

import random
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.metrics.bootstrap import ratio
from tasks.metrics.slots import slot_counts

PEOPLE = ("#Person1#", "#Person2#", "Ann", "Anna")
DAYS = ("Monday", "Tuesday morning", "Tuesday")
FACTS = st.builds(
    lambda people, day: {"who": people[0], "whom": people[1], "when": day},
    st.permutations(PEOPLE),
    st.sampled_from(DAYS),
)


def sentence(facts: dict[str, str]) -> str:
    return f"{facts['who']} asks {facts['whom']} to come on {facts['when']}."


def f1(predictions: list[str], slots: list[dict[str, str]], references: list[str] | None = None) -> float:
    targets = [[text] for text in references or map(sentence, slots)]
    return float(ratio(slot_counts(predictions, targets, slots).sum(axis=0, keepdims=True))[0])


ALL = [
    {"who": who, "whom": whom, "when": day} for who, whom, day in product(PEOPLE, PEOPLE, DAYS) if who != whom
]


def test_one_wrong_day_costs_one_of_three() -> None:
    facts = {"who": "Ann", "whom": "Anna", "when": "Monday"}
    answers = ["Ann asks Anna to come on Tuesday.", *map(sentence, ALL)]
    right, all_mentions = slot_counts(
        answers, [[text] for text in map(sentence, [facts, *ALL])], [facts, *ALL]
    )[0]
    assert (right, all_mentions) == (2 * 2, 3 + 3)


def test_swapping_who_and_whom_costs_both() -> None:
    swapped = [{**facts, "who": facts["whom"], "whom": facts["who"]} for facts in ALL]
    assert f1([sentence(facts) for facts in swapped], ALL) == 1 / 3


def test_missing_and_invented_facts_cost() -> None:
    slots = [{"what": "tea"}, {"what": "milk"}]
    assert f1(["tea", ""], slots, ["tea", "milk"]) == 2 * 1 / (1 + 2)
    assert f1(["tea and milk", "milk"], slots, ["tea", "milk"]) == 2 * 2 / (3 + 2)


def test_a_value_counts_as_a_whole_phrase_in_any_case() -> None:
    slots = [{"when": "Tuesday morning"}, {"when": "Tuesday"}, {"when": "art"}]
    references = ["Tuesday morning", "Tuesday", "art"]
    assert f1(["on tuesday MORNING", "by Tuesday,", "Art!"], slots, references) == 1
    assert f1(["Tuesday", "Tuesday morning", "start party"], slots, references) == 0


def test_roles_follow_the_reference_not_the_names_of_the_slots() -> None:
    slots = [{"from": "Ann", "about": "Ben"}, {"from": "Ben", "about": "Ann"}]
    references = ["Ann talks about Ben.", "Ben talks about Ann."]
    assert f1(references, slots, references) == 1
    assert f1(references[::-1], slots, references) == 0


def test_an_example_without_slots_counts_nothing() -> None:
    counts = slot_counts(["Monday", "Monday"], [["x"], ["Monday"]], [{}, {"when": "Monday"}])
    assert counts.tolist() == [[0, 0], [2, 2]]


@settings(deadline=None)
@given(st.lists(FACTS, min_size=1, max_size=6))
def test_the_reference_itself_is_all_right(slots: list[dict[str, str]]) -> None:
    assert f1([sentence(facts) for facts in slots], slots) == 1


@settings(deadline=None)
@given(st.lists(st.tuples(FACTS, FACTS), min_size=1, max_size=6), st.integers())
def test_bounds_and_order(pairs: list[tuple[dict[str, str], dict[str, str]]], seed: int) -> None:
    said, slots = zip(*pairs, strict=True)
    score = f1([sentence(facts) for facts in said], list(slots))
    assert 0 <= score <= 1
    random.Random(seed).shuffle(pairs)
    said, slots = zip(*pairs, strict=True)
    assert f1([sentence(facts) for facts in said], list(slots)) == score
