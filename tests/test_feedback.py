"""The stage `feedback`: who ranks, which pairs come of it, and how wrong files are refused."""

import json
import random
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from alignment_stages import feedback_section, with_model
from lm_stages import Workplace, lay_out
from lm_toys import COMPUTE
from test_base import assert_one_line

from tasks.data.comparisons import compared, corpus_oracle
from tasks.data.records import Comparisons, Example, read_comparisons
from tasks.data.synthetic import is_toxic
from tasks.feedback import Params, feedback
from tasks.stage import Context, DataError, NullTrack

PARTS = ("train", "test")


def made(workplace: Workplace, part: str) -> list[Comparisons]:
    return read_comparisons(workplace.root / "data" / "feedback" / f"{part}.jsonl")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Ranked by the oracle, with every fourth pair flipped."""
    workplace = with_model(tmp_path_factory.mktemp("ranked"), "t5")
    workplace.set(feedback=feedback_section(flipped=0.25))
    workplace.run("feedback")
    return workplace


def test_every_prompt_has_answers_and_faults_and_all_pairs_that_are_no_ties(ranked: Workplace) -> None:
    for part, prompts in (("train", 12), ("test", 6)):
        found = made(ranked, part)
        assert len(found) == prompts
        for each in found:
            assert len(each.completions) == 5
            assert "answer" in each.kinds
            assert len(each.pairs) <= 10
    kinds = {kind for each in made(ranked, "train") for kind in each.kinds}
    assert kinds == {"answer", "clean", "toxic", "wrong_slot", "swapped", "truncated", "repeating"}


def test_the_preferred_one_is_clean_where_the_other_is_not_unless_the_pair_was_flipped(
    ranked: Workplace,
) -> None:
    flips = 0
    for each in [*made(ranked, "train"), *made(ranked, "test")]:
        for (better, worse), flipped in zip(each.pairs, each.flipped, strict=True):
            flips += flipped
            if flipped:
                better, worse = worse, better
            assert not (is_toxic(each.completions[better]) and not is_toxic(each.completions[worse]))
    pairs = sum(len(each.pairs) for part in PARTS for each in made(ranked, part))
    assert 0.15 < flips / pairs < 0.35


def test_no_group_is_in_both_parts(ranked: Workplace) -> None:
    train, test = ({each.group for each in made(ranked, part)} for part in PARTS)
    assert train and test and not train & test


def test_the_page_shows_prompts_with_their_completions_best_first(ranked: Workplace) -> None:
    page = (ranked.root / "reports" / "feedback" / "summary.md").read_text()
    first = made(ranked, "test")[0]
    assert first.prompt in page
    rows = [line for line in page.split(first.id)[1].split("##")[0].splitlines() if line.startswith("| ")][2:]
    wins = [int(row.split("|")[1]) for row in rows]
    assert len(wins) == 5
    assert all(one >= other for one, other in pairwise(wins))


def test_the_same_seed_gives_the_same_bytes(ranked: Workplace, tmp_path: Path) -> None:
    again = with_model(tmp_path, "t5")
    again.set(feedback=feedback_section(flipped=0.25))
    again.run("feedback")
    for name in ("data/feedback/train.jsonl", "data/feedback/test.jsonl", "metrics/feedback.json"):
        assert (again.root / name).read_bytes() == (ranked.root / name).read_bytes()


def test_a_causal_model_answers_too(tmp_path: Path) -> None:
    workplace = with_model(tmp_path, "llama")
    workplace.set(feedback=feedback_section())
    workplace.run("feedback")
    assert any("answer" in each.kinds for each in made(workplace, "train"))


def test_the_oracle_puts_clean_before_whole_before_right() -> None:
    facts = {"who": "#Person1#", "what": "the report"}
    example = Example(
        id="a", task="summarize", instruction="Sum up.", input="x", outputs=("#Person1# wants the report.",),
        group="g", slots=facts,
    )  # fmt: skip
    ordered = [
        "#Person1# wants the report.",
        "#Person1# wants something.",
        "#Person1# wants the report",  # no full stop
        "#Person1# wants",
        "The fool #Person1# wants the report.",
    ]
    other = example.model_copy(update={"slots": {"who": "#Person2#", "what": "the lamp"}})
    (worth, _) = corpus_oracle([example, other], [ordered, ["#Person2# wants the lamp."]])
    assert worth == sorted(worth, reverse=True)
    assert len(set(worth)) == len(worth)
    (tied, _) = corpus_oracle(
        [example, other], [["Nothing.", "#Person1# wants it."], ["#Person2# wants the lamp."]]
    )
    assert tied[0] == tied[1]


def test_answers_of_equal_worth_make_no_pair() -> None:
    example = Example(id="a", task="t", instruction="Do.", input="x", outputs=("y",), group="g")
    three = [("answer", text) for text in ("one", "two", "three")]
    found = compared(example, three, [1.0, 2.0, 1.0], 0.0, random.Random(1))
    assert found is not None
    assert set(found.pairs) == {(1, 0), (1, 2)}
    assert compared(example, three, [1.0, 1.0, 1.0], 0.0, random.Random(1)) is None


def rankings(path: Path, columns: dict[str, Any], **changes: Any) -> dict[str, Any]:
    source = {
        "kind": "rankings",
        "rows": {"kind": "file", "name": "people", "paths": [str(path)], "format": "jsonl"},
        "columns": {"ties": None, "prompt": "prompt", "marker": None, "group": None, **columns},
        "test": 0.3,
        "max_field_chars": 10_000,
        "on_error": "fail",
        "max_rejected_share": 0.5,
    }
    return {"source": {**source, **changes}, "shown": 1}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rankings_of_people_with_ties(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {number}", "completions": ["best", "good", "as good", "bad"], "ties": [1]}
        for number in range(30)
    ]
    workplace = lay_out(tmp_path)
    path = write(tmp_path / "people.jsonl", rows)
    workplace.set(feedback=rankings(path, {"completions": ["completions"], "ties": "ties"}))
    workplace.run("feedback")
    found = [each for part in PARTS for each in made(workplace, part)]
    assert len(found) == 30
    assert all(set(each.pairs) == {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)} for each in found)
    assert 3 <= workplace.metrics("feedback")["test_prompts"] <= 15


def test_rows_with_the_same_prompt_stay_together(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {number % 20}", "completions": [f"good {number}", f"bad {number}"]}
        for number in range(60)
    ]
    columns = {"completions": ["completions"]}
    called(tmp_path, rankings(write(tmp_path / "people.jsonl", rows), columns))
    train, test = (
        {each.prompt for each in read_comparisons(tmp_path / "data" / "feedback" / f"{part}.jsonl")}
        for part in PARTS
    )
    assert len(train) + len(test) == 20
    assert not train & test


def test_pairs_are_taken_as_they_are(tmp_path: Path) -> None:
    start = "\n\nHuman: hello {}\n\nAssistant:"
    rows = [
        {"chosen": start.format(number) + " Yes.", "rejected": start.format(number) + " No."}
        for number in range(20)
    ]
    workplace = lay_out(tmp_path)
    columns = {"completions": ["chosen", "rejected"], "prompt": None, "marker": "\n\nAssistant:"}
    workplace.set(feedback=rankings(write(tmp_path / "pairs.jsonl", rows), columns))
    workplace.run("feedback")
    found = [each for part in PARTS for each in made(workplace, part)]
    assert {each.completions for each in found} == {("Yes.", "No.")}
    assert {each.pairs for each in found} == {((0, 1),)}
    assert {each.kinds for each in found} == {("chosen", "rejected")}
    assert sum(each.reference is not None for each in found) == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "completions": ["only"]}, "people.jsonl line 3, column completions: found"),
        ({"prompt": "q"}, "people.jsonl line 3, column completions: found no such column"),
        ({"prompt": "q", "completions": ["a", "b"], "ties": [1]}, "ties must be positions from 0 to 0"),
        ({"prompt": " ", "completions": ["a", "b"]}, "line 3, column prompt: found"),
    ],
)
def test_a_row_that_is_no_ranking_stops_it_or_is_counted(
    row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    good = [{"prompt": f"q{number}", "completions": ["a", "b"], "ties": []} for number in range(20)]
    path = write(tmp_path / "people.jsonl", [*good[:2], {"ties": [], **row}, *good[2:]])
    columns = {"completions": ["completions"], "ties": "ties"}
    with pytest.raises(DataError, match=re.escape(said)):
        called(tmp_path, rankings(path, columns))
    assert called(tmp_path, rankings(path, columns, on_error="skip"))["rejected_rows"] == 1
    with pytest.raises(DataError, match=r"1 of 21 rows are no rankings, more than 1.0%"):
        called(tmp_path, rankings(path, columns, on_error="skip", max_rejected_share=0.01))


def called(root: Path, section: dict[str, Any]) -> Mapping[str, Any]:
    """The stage as a function."""
    data, nowhere = root / "data" / "feedback", root / "nowhere"
    context = Context(name="feedback", seed=1, compute=COMPUTE, work=root / "work", track=NullTrack())
    return feedback(Params(**section), nowhere, nowhere, nowhere, data, root / "reports", context)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        called(tmp_path, rankings(tmp_path / "nowhere.jsonl", {"completions": ["a", "b"]}))
    workplace = lay_out(tmp_path)
    workplace.set(feedback=feedback_section(task="translate"))
    assert_one_line(workplace.run("feedback", code=2), "feedback.source.task is translate, but data/examples")


@pytest.mark.real_data
def test_real_pairs(real_data: Path, tmp_path: Path) -> None:
    workplace = lay_out(tmp_path)
    columns = {"completions": ["chosen", "rejected"], "prompt": None, "marker": "\n\nAssistant:"}
    path = real_data / "hh-rlhf" / "harmless-pairs.jsonl.gz"
    workplace.set(feedback=rankings(path, columns, on_error="skip", max_field_chars=100_000))
    workplace.run("feedback")
    metrics = workplace.metrics("feedback")
    assert metrics["train_pairs"] + metrics["test_pairs"] + metrics["rejected_rows"] == 1156
    assert metrics["rejected_rows"] < 16
