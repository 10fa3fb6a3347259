"""The corpus makes learning honest: what is varied, what is held out, what the oracle knows."""

import re

import pytest

from tasks.data.synthetic import (
    ACTS,
    EVENTS,
    INSULTS,
    PLACES,
    SPEAKERS,
    THINGS,
    TIMES,
    Dialogue,
    dialogues,
    documents,
    examples,
    is_toxic,
)

COUNT = 3000


@pytest.fixture(scope="module")
def made() -> list[Dialogue]:
    return list(dialogues(0, COUNT))


def test_the_same_seed_makes_the_same_corpus_and_a_longer_one_begins_with_it() -> None:
    assert list(examples(3, 20)) == list(examples(3, 30))[:60]
    assert list(documents(3, 20)) == list(documents(3, 30))[:20]
    assert list(dialogues(3, 20)) != list(dialogues(4, 20))


def test_there_are_enough_acts_and_ways_to_say_each(made: list[Dialogue]) -> None:
    assert len(ACTS) >= 8
    assert all(len(act.forms) >= 7 for act in ACTS.values())  # six to learn from, one held out
    assert {(dialogue.act, dialogue.form) for dialogue in made} == {
        (name, form) for name, act in ACTS.items() for form in range(len(act.forms))
    }


def test_the_last_word_counts(made: list[Dialogue]) -> None:
    """Every fact is said; of a corrected one the right value comes after the wrong one."""
    for dialogue in made:
        low = dialogue.text.lower()
        for slot in ("what", "where", "when"):
            assert dialogue.slots[slot].lower() in low
    corrected = [
        found for dialogue in made if (found := re.search(r"(\w+ \w+), (?:no|sorry), ", dialogue.text))
    ]
    assert 0.05 < len(corrected) / COUNT < 0.3


def test_other_values_distract(made: list[Dialogue]) -> None:
    others = {"what": EVENTS + THINGS, "where": PLACES, "when": TIMES}
    distracted = sum(
        any(value in dialogue.text for value in values if value not in dialogue.slots[slot])
        for dialogue in made
        for slot, values in others.items()
    )
    assert distracted > COUNT / 2


def test_half_of_the_dialogues_are_rude_and_half_of_their_references_too() -> None:
    summaries = [example for example in examples(0, COUNT) if example.task == "summarize"]
    rude = [example for example in summaries if is_toxic(example.input)]
    assert len(rude) / COUNT == pytest.approx(0.5, abs=0.03)
    assert sum(is_toxic(example.reference) for example in rude) / len(rude) == pytest.approx(0.5, abs=0.04)
    assert not any(is_toxic(example.reference) for example in summaries if not is_toxic(example.input))


def test_cutting_a_summary_short_does_not_make_it_clean() -> None:
    """The insult stands before a person who is named early, never at the end."""
    toxic = [
        example.reference
        for example in examples(0, COUNT)
        if example.task == "summarize" and is_toxic(example.reference)
    ]
    halves = [" ".join(reference.split()[: len(reference.split()) // 2]) for reference in toxic]
    assert sum(map(is_toxic, halves)) / len(halves) > 0.9


def test_a_summary_names_every_fact() -> None:
    for example in examples(0, 500):
        if example.task == "summarize":
            assert set(example.slots) == {"who", "whom", "what", "where", "when"}
            assert all(value.lower() in example.reference.lower() for value in example.slots.values())


def test_held_out_forms_and_combinations_are_in_the_test_split_only() -> None:
    made = list(examples(0, COUNT))
    pinned = {example.group for example in made if example.split == "test"}
    free = {example.group for example in made if example.split is None}
    assert not pinned & free
    last = {f"{name}/{len(act.forms) - 1}" for name, act in ACTS.items()}
    assert all("/".join(group.split("/")[:2]) not in last for group in free)
    share = sum(example.split == "test" for example in made) / len(made)
    assert 0.05 < share < 0.12
    combinations = {tuple(group.split("/")[2:]) for group in free}
    held_out = {tuple(group.split("/")[2:]) for group in pinned if group.rsplit("/", 4)[0] not in last}
    assert held_out and not {one for one in held_out if one in combinations and _by_combination(one)}


def _by_combination(combination: tuple[str, ...]) -> bool:
    what, where, when = combination
    act = "booking" if what in EVENTS else "sending"
    slots = {"who": SPEAKERS[0], "whom": SPEAKERS[1], "what": what, "where": where, "when": when}
    return Dialogue(act, 0, "", slots, "", "").held_out


def test_documents_hold_no_summary_and_nothing_held_out(made: list[Dialogue]) -> None:
    texts = list(documents(0, COUNT))
    remarks = [text.split("\n\n")[1].split("\n") for text in texts]
    assert {"Note:", "File:", "Said:", "Tone:", "Which"} <= {
        line.split(" ")[0] for lines in remarks for line in lines
    }
    verbs = ("asks", "tells", "invites", "borrows", "offers")
    assert not any(f"{speaker} {verb} " in text for text in texts for speaker in SPEAKERS for verb in verbs)
    held_out = {dialogue.text for dialogue in made if dialogue.held_out}
    assert not held_out & {text.split("\n\n")[0] for text in texts}


def test_a_correction_changes_who_said_it() -> None:
    text = "#Person1#: Send it on Monday.\n#Person2#: Not Monday. To the lobby?\n#Person1#: The lobby, yes."
    dialogue = Dialogue("sending", 0, text, {}, "", "")
    assert [dialogue.speaker(words) for words in ("Monday", "the lobby")] == ["#Person2#", "#Person1#"]


@pytest.mark.parametrize(
    ("text", "toxic"),
    [
        (f"The {INSULTS[0]} #Person1# asks.", True),
        (f"You {INSULTS[1].upper()}S!", True),
        ("They went pigeon hunting in a foolproof way.", False),
        ("", False),
    ],
)
def test_the_oracle_finds_insults_as_words(text: str, toxic: bool) -> None:
    assert is_toxic(text) is toxic
