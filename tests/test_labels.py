"""What labelers are shown, what becomes of what they say, and how far they agree."""

import json
import math
import os
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_toys import TEXTS, items

from tasks.data.records import Example
from tasks.labels import journal, sheet
from tasks.labels.agreement import Metric, alpha, report
from tasks.labels.desk import Desk
from tasks.labels.journal import Judgement, judged
from tasks.stage import DataError, UserError


def desk(folder: Path, count: int = 12, overlap: float = 1.0, seed: int = 1) -> Desk:
    return Desk(items(count), folder, seed, overlap, saved=lambda: None)


def rank(at: Desk, labeler: str, best_first: list[list[str]]) -> dict[str, Any]:
    """Rank the item that is shown as `best_first` says, and return the next view."""
    shown = at.view(labeler)["item"]
    place = {text: rank for rank, texts in enumerate(best_first, start=1) for text in texts}
    ranks = [place[text] for text in shown["answers"]]
    return at.judge(labeler, shown["id"], "ranked", shown["answers"], ranks, 1.5)


# --- the sheet


def test_answers_that_are_equal_are_shown_once_and_blank_ones_not_at_all() -> None:
    example = Example(id="a", task="t", instruction="Do.", input="x", outputs=("y",), group="g")
    made = sheet.item(example, {"finetune": ["one ", " "], "ppo": ["two", "one"]})
    assert made is not None
    assert [(answer.text, answer.variants) for answer in made.answers] == [
        ("one", ("finetune", "ppo")),
        ("two", ("ppo",)),
    ]
    assert sheet.item(example, {"finetune": ["one", "  "], "ppo": ["one", ""]}) is None


# --- the journal


def test_ranks_become_a_ranking_best_first_with_ties() -> None:
    item = items(1)[0]
    made = judged(item, "ann", "ranked", [2, 1, 2], [2, 0, 1], "now", 1.0)
    assert made.completions == (TEXTS[0], TEXTS[1], TEXTS[2])
    assert (made.ties, made.levels) == ((1,), (0, 1, 1))
    assert made.variants == (("base",), ("finetune",), ("ppo",))
    for verdict in ("all bad", "skipped"):
        assert judged(item, "ann", verdict, [], [2, 0, 1], "now", 1.0).pairs == ()
    for ranks in ([1, 2], [1, 2, 3, 4], [0, 1, 2], [1, 2, "3"]):
        with pytest.raises(UserError, match="3 answers need as many ranks from 1 up"):
            judged(item, "ann", "ranked", ranks, [0, 1, 2], "now", 1.0)


def test_every_line_is_on_the_disk_before_the_next_item_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file))[1])
    here = desk(tmp_path)
    for number in range(1, 4):
        rank(here, "ann", [[TEXTS[0]], [TEXTS[1], TEXTS[2]]])
        size = (tmp_path / "ann.jsonl").stat().st_size
        assert size in synced
        assert len((tmp_path / "ann.jsonl").read_text().splitlines()) == number
    assert next(iter(journal.read(tmp_path / "ann.jsonl").values())).ties == (1,)


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_left_out_and_cut_off_and_the_labeler_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "ann.jsonl"
    first = desk(tmp_path)
    for _ in range(3):
        seen = first.view("ann")["item"]
        rank(first, "ann", [[text] for text in TEXTS])
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(journal.read(path)) == 2
    again = desk(tmp_path)
    assert again.view("ann")["item"] == seen  # the one whose line was torn
    whole = b"".join(path.read_bytes().splitlines(keepends=True)[:2])
    assert journal.mend(path) > 0
    assert path.read_bytes() == whole
    assert journal.mend(path) == 0
    rank(again, "ann", [[text] for text in TEXTS])
    assert len(journal.read(path)) == 3


def test_a_line_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = desk(tmp_path)
    rank(here, "ann", [[text] for text in TEXTS])
    before, shown = (tmp_path / "ann.jsonl").read_bytes(), here.view("ann")
    write = os.write

    def full(file: int, data: memoryview) -> int:
        if len(data) > 20:
            return write(file, data[:20])
        raise OSError(28, "No space left on device")

    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="No space"):
            rank(here, "ann", [[text] for text in TEXTS])
    assert (tmp_path / "ann.jsonl").read_bytes() == before
    assert here.view("ann") == shown
    line = next(iter(journal.read(tmp_path / "ann.jsonl").values()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: full(file, data[:40]))
        with pytest.raises(OSError, match="No space"):
            journal.append(tmp_path / "ann.jsonl", line.model_copy(update={"seconds": 9.0}))
    assert (tmp_path / "ann.jsonl").read_bytes() == before


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    rank(desk(tmp_path), "ann", [[text] for text in TEXTS])
    path = tmp_path / "ann.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(DataError, match=r"ann.jsonl line 1: .*: Field required; mend or remove the line"):
        journal.read(path)


@pytest.mark.parametrize("name", ["", "../ann", ".ann", "a/b", "a b", "x" * 41, "ann\n"])
def test_a_name_that_makes_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    here = desk(tmp_path)
    item = here.view("ann")["item"]["id"]
    for act in (
        lambda: here.view(name),
        lambda: here.judge(name, item, "skipped", TEXTS, [], 1.0),
        lambda: here.undo(name),
    ):
        with pytest.raises(UserError, match="expected up to 40 letters"):
            act()
    assert list(tmp_path.iterdir()) == []
    assert here.view("Zoë-2")["item"] is not None


# --- who is shown what


def test_the_page_is_told_nothing_of_who_answered(tmp_path: Path) -> None:
    told = json.dumps(desk(tmp_path).view("ann"))
    assert TEXTS[0] in told
    assert not any(name in told for name in ("finetune", "ppo", "base", "variants"))


def test_order_is_the_same_after_a_restart_and_another_for_another_labeler(tmp_path: Path) -> None:
    def seen(labeler: str, folder: Path, restart: bool) -> list[tuple[str, tuple[str, ...]]]:
        here, found = desk(folder), []
        while (item := here.view(labeler)["item"]) is not None:
            found.append((item["id"], tuple(item["answers"])))
            here.judge(labeler, item["id"], "skipped", item["answers"], [], 0.1)
            here = desk(folder) if restart else here
        return found

    first = seen("ann", tmp_path / "one", restart=False)
    assert len(first) == 12
    assert seen("ann", tmp_path / "two", restart=True) == first
    other = seen("bob", tmp_path / "one", restart=False)
    assert sorted(name for name, _ in other) == sorted(name for name, _ in first)
    assert [name for name, _ in other] != [name for name, _ in first]
    assert len({answers for _, answers in first}) > 1
    assert {frozenset(answers) for _, answers in first} == {frozenset(TEXTS)}


def test_the_overlap_is_for_all_and_the_rest_for_who_comes_first(tmp_path: Path) -> None:
    here = desk(tmp_path, count=40, overlap=0.5)
    total = {"ann": here.view("ann")["total"]}
    while here.view("ann")["item"] is not None:
        rank(here, "ann", [[text] for text in TEXTS])
    total["bob"] = here.view("bob")["total"]
    assert total["ann"] == 40
    assert 10 <= total["bob"] <= 30
    while (after := here.view("bob"))["item"] is not None:
        rank(here, "bob", [[text] for text in TEXTS])
    assert after["done"] == after["total"] == total["bob"]
    found = journal.read_all(tmp_path)
    assert set(found["bob"]) < set(found["ann"])


def test_what_somebody_skipped_is_for_the_others(tmp_path: Path) -> None:
    here = desk(tmp_path, count=3, overlap=0.0)
    for verdict in ("skipped", "all bad", "skipped"):
        here.judge("ann", here.view("ann")["item"]["id"], verdict, TEXTS, [], 1.0)
    assert here.view("bob")["total"] == 2


def test_undo_takes_back_one_after_the_other_and_shows_it_again(tmp_path: Path) -> None:
    here, seen = desk(tmp_path), []
    assert here.undo("ann")["done"] == 0
    for _ in range(3):
        seen.append(here.view("ann")["item"])
        rank(here, "ann", [[text] for text in TEXTS])
    assert here.undo("ann")["item"] == seen[2]
    assert here.undo("ann")["item"] == seen[1]
    assert here.view("ann")["done"] == desk(tmp_path).view("ann")["done"] == 1
    assert desk(tmp_path).view("ann")["item"] == seen[1]
    assert len((tmp_path / "ann.jsonl").read_text().splitlines()) == 5  # nothing is ever removed
    rank(here, "ann", [[TEXTS[2]], [TEXTS[0], TEXTS[1]]])
    assert journal.read(tmp_path / "ann.jsonl")[seen[1]["id"]].completions[0] == TEXTS[2]


def test_an_answer_given_twice_counts_once(tmp_path: Path) -> None:
    here = desk(tmp_path)
    item = here.view("ann")["item"]["id"]
    for verdict in ("all bad", "skipped"):
        assert here.judge("ann", item, verdict, TEXTS, [], 1.0)["done"] == 1
    assert journal.read(tmp_path / "ann.jsonl")[item].verdict == "all bad"
    item = here.view("ann")["item"]["id"]
    for name, verdict, answers in (
        ("0" * 16, "skipped", TEXTS), (item, "undone", TEXTS), (item, "all bad", TEXTS[1:]),
    ):  # fmt: skip
        with pytest.raises(UserError, match="load the page again"):
            here.judge("ann", name, verdict, answers, [], 1.0)


def test_what_was_said_outlives_the_sheet_and_only_preferences_are_collected(tmp_path: Path) -> None:
    folder, target = tmp_path / "answers", tmp_path / "inputs" / "people.jsonl"
    assert journal.collect(folder, target) == 0
    assert not target.exists()
    here = desk(folder, count=4)
    rank(here, "ann", [[TEXTS[1]], [TEXTS[0], TEXTS[2]]])
    rank(here, "ann", [TEXTS])
    for verdict in ("all bad", "skipped"):
        here.judge("ann", here.view("ann")["item"]["id"], verdict, TEXTS, [], 1.0)
    rank(here, "bob", [[text] for text in TEXTS])
    other = Desk(items(4, of="another day"), folder, 1, 1.0, saved=lambda: None)
    rank(other, "ann", [[text] for text in TEXTS])
    here.undo("bob")
    assert journal.collect(folder, target) == journal.count(folder) == 2
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["labeler"] for row in rows] == ["ann", "ann"]
    assert rows[0]["completions"][0] == TEXTS[1]
    assert rows[0]["ties"] == [1]
    assert "another day" in rows[1]["prompt"]
    before = target.stat().st_mtime_ns
    journal.collect(folder, target)
    assert target.stat().st_mtime_ns == before


# --- agreement

NONE = None
OBSERVERS = (  # the example C of Krippendorff's paper: four observers, twelve units
    (1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3),
    (NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE),
)


@pytest.mark.parametrize(("metric", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_the_published_example(metric: Metric, published: float) -> None:
    units = [[value for value in unit if value is not None] for unit in zip(*OBSERVERS, strict=True)]
    assert alpha(units, metric) == pytest.approx(published, abs=0.0005)


def by_pairs(units: list[list[int]], metric: Metric) -> float | None:
    """1 - D_o / D_e, where both are means over all pairs of values: within units, and within everything."""
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    often = Counter(values)

    def distance(a: int, b: int) -> float:
        low, high = sorted((a, b))
        between = sum(number for value, number in often.items() if low < value < high)
        steps = {
            "nominal": float(a != b),
            "interval": float(b - a),
            "ordinal": between + (often[low] + often[high]) / 2 if a != b else 0.0,
        }
        return steps[metric] ** 2

    expected = [distance(a, b) for a, b in combinations(values, 2)]
    if not expected or not sum(expected):
        return None
    # a unit of m values weighs m, whatever the number of its pairs
    within = [sum(distance(a, b) for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units]
    return 1 - (math.fsum(within) / len(values)) / (math.fsum(expected) / len(expected))


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=8),
    st.sampled_from(["nominal", "ordinal", "interval"]),
)
def test_alpha_is_what_means_over_pairs_give(units: list[list[int]], metric: Metric) -> None:
    found, expected = alpha(units, metric), by_pairs(units, metric)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_full_agreement_is_1_and_the_opposite_is_below_0(tmp_path: Path) -> None:
    here = desk(tmp_path, count=8)
    for labeler, best_first in (("ann", TEXTS), ("bob", TEXTS), ("eve", TEXTS[::-1])):
        for _ in range(6):
            rank(here, labeler, [[text] for text in best_first])
    found = report(journal.read_all(tmp_path))
    between = {tuple(each["labelers"]): each for each in found["between"]}
    assert between["ann", "bob"]["alpha"] == between["ann", "bob"]["same"] == 1.0
    assert between["ann", "eve"]["same"] == 0.0
    assert between["ann", "eve"]["alpha"] < -0.5
    assert between["ann", "bob"]["alpha"] > found["all"]["alpha"] > between["ann", "eve"]["alpha"]
    assert found["labelers"]["ann"] == {"ranked": 6, "all_bad": 0, "skipped": 0, "pairs": 18}


def test_who_skips_says_nothing_and_all_bad_says_that_none_is_better(tmp_path: Path) -> None:
    here = desk(tmp_path, count=1)
    name = here.view("ann")["item"]["id"]
    here.judge("ann", name, "skipped", TEXTS, [], 1.0)
    here.judge("bob", name, "all bad", TEXTS, [], 1.0)
    alone = report(journal.read_all(tmp_path))
    assert (alone["all"]["pairs"], alone["all"]["alpha"], alone["items_of_several"]) == (0, None, 0)
    rank(here, "eve", [TEXTS[:2], TEXTS[2:]])
    found = report(journal.read_all(tmp_path))
    assert (found["all"]["pairs"], found["items_of_several"]) == (3, 1)
    assert found["all"]["same"] == pytest.approx(1 / 3)


def test_a_judgement_survives_its_line() -> None:
    made = judged(items(1)[0], "Zoë", "ranked", [1, 1, 2], [0, 1, 2], "now", 1.0)
    assert Judgement.model_validate_json(made.line()) == made
