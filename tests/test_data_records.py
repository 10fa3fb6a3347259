"""Examples, rankings and comparisons: what they refuse, and that they survive a file."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.data.records import Comparisons, Example, Ranking, read_comparisons, read_examples
from tasks.stage import DataError

FIELDS = {
    "id": "a-1",
    "task": "summarize",
    "instruction": "Sum up:",
    "input": "x y",
    "outputs": ("z",),
    "group": "g",
}
filled = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())


def test_prompt_puts_the_input_where_the_instruction_says() -> None:
    assert Example(**FIELDS).prompt == "Sum up:\n\nx y"
    assert Example(**{**FIELDS, "instruction": "Of {input}, {input}?"}).prompt == "Of x y, x y?"
    assert Example(**{**FIELDS, "outputs": ("first", "second")}).reference == "first"


@pytest.mark.parametrize(
    ("field", "value"),
    [("outputs", ()), ("outputs", ("  \n",)), ("task", ""), ("group", " "), ("split", "dev"), ("extra", 1)],
)
def test_an_example_refuses(field: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Example(**{**FIELDS, field: value})


@settings(deadline=None)
@given(text=filled, answer=filled)
def test_an_example_survives_a_file(tmp_path_factory: pytest.TempPathFactory, text: str, answer: str) -> None:
    example = Example(**{**FIELDS, "input": text, "outputs": (answer, "b")}, slots={"b": "1", "a": "2"})
    path = tmp_path_factory.mktemp("examples") / "x.jsonl"
    path.write_text(example.line() + "\n", encoding="utf-8")
    assert read_examples(path) == [example]
    assert list(json.loads(example.line())) == sorted(json.loads(example.line()))


def test_examples_are_read_by_task_and_faults_have_a_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [Example(**{**FIELDS, "task": task}).line() for task in ("a", "b", "a")]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert [example.task for example in read_examples(path, {"a"})] == ["a", "a"]
    path.write_text("\n".join([*lines, '{"id": "x"}']), encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl line 4: task: Field required"):
        read_examples(path)
    with pytest.raises(DataError, match="is missing; run prepare first"):
        read_examples(tmp_path / "none.jsonl")


def test_a_ranking_makes_pairs_of_all_that_are_not_tied() -> None:
    ranking = Ranking(prompt="p", completions=("a", "b", "c", "d"), group="g", ties=(1,))
    assert ranking.levels == (0, 1, 1, 2)
    assert ranking.pairs == ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))


@pytest.mark.parametrize(
    "fields",
    [
        {"completions": ("a",)},
        {"completions": ("a", "a")},
        {"completions": ("a", "b"), "ties": (1,)},
        {"completions": ("a", "b"), "ties": (0, 0)},
        {"completions": ("a", " ")},
    ],
)
def test_a_ranking_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Ranking(prompt="p", group="g", **fields)


def test_equal_completions_may_be_tied() -> None:
    assert Ranking(prompt="p", completions=("a", "a", "b"), group="g", ties=(0,)).pairs == ((0, 2), (1, 2))


COMPARED = {
    "id": "p-1",
    "prompt": "Sum up: x",
    "completions": ("good", "bad", "worse"),
    "kinds": ("reference", "answer", "toxic"),
    "pairs": ((0, 1), (2, 0)),
    "flipped": (False, True),
    "reference": "good",
    "group": "g",
}


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("completions", ("good", "bad", "good"), "twice"),
        ("completions", ("good", " ", "worse"), "pattern"),
        ("kinds", ("reference",), "1 kinds for 3"),
        ("flipped", (False,), "1 values of flipped for 2 pairs"),
        ("pairs", ((0, 1), (0, 3)), "from 0 to 2"),
        ("pairs", ((0, 1), (-1, 0)), "from 0 to 2"),
        ("pairs", ((0, 1), (2, 2)), "not two positions"),
        ("pairs", ((0, 1), (1, 0)), "compared twice"),
        ("pairs", (), "at least 1"),
    ],
)
def test_comparisons_refuse(field: str, value: object, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Comparisons(**{**COMPARED, field: value})


@settings(deadline=None)
@given(completions=st.lists(filled, min_size=2, unique=True), reference=st.none() | filled)
def test_comparisons_survive_a_file(
    tmp_path_factory: pytest.TempPathFactory, completions: list[str], reference: str | None
) -> None:
    made = Comparisons(
        **{**COMPARED, "completions": completions, "kinds": ["answer"] * len(completions), "pairs": [(1, 0)]}
        | {"flipped": [True], "reference": reference}
    )
    path = tmp_path_factory.mktemp("comparisons") / "x.jsonl"
    path.write_text(made.line() + "\n", encoding="utf-8")
    assert read_comparisons(path) == [made]


def test_faults_in_comparisons_have_a_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(Comparisons(**COMPARED).line() + "\n{}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl line 2: id: Field required; run feedback again"):
        read_comparisons(path)
    with pytest.raises(DataError, match="is missing; run feedback first"):
        read_comparisons(tmp_path / "none.jsonl")
