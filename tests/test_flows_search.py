"""The search: which trials it makes, how it goes on, which ones it gives up. No trial runs here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import build

from flows import search, snapshot, sweep
from flows.search import Search
from flows.sweep import Record, Sweep
from tasks.stage import UserError

SEARCH = ("a.x=0.001..1.0:log", "a.n=2..9", "a.k=[1],[2]")
VALUES = {"x": 0.0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a commit that a search can start from."""
    return build(tmp_path / "toy", {"a": [], "b": ["a"]}, light=True).root


def begin(root: Path, name: str = "s", **changes: object) -> Sweep:
    known = {"search": SEARCH, "objective": "b.score", "trials": 8, **changes}
    chosen = Sweep(name, snapshot.take(root, "start"), **known)  # type: ignore[arg-type]
    (sweep.place(root, name) / "points").mkdir(parents=True, exist_ok=True)
    return chosen


def settle(plan: Search, record: Record, root: Path, score: float) -> None:
    """End a trial as if it had run: a work tree with its metrics."""
    write(root / "tree", "b", score=score)
    record.state = "done"
    plan.settled(record, root / "tree")
    sweep.keep(root, "s", record)


def write(folder: Path, stage: str, **metrics: float) -> None:
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    (folder / "metrics" / f"{stage}.json").write_text(json.dumps(metrics))


def run(root: Path, chosen: Sweep, score: Callable[[Record], float], restarts: bool) -> list[dict[str, object]]:
    """The settings of all trials, with a new process's view of the search before each if `restarts`."""
    records: list[Record] = []
    plan = Search(root, chosen, records)
    while (record := plan.take([])) is not None:
        settle(plan, record, root, score(record))
        if restarts:
            records = sweep.records(root, "s")
            plan = Search(root, chosen, records)
    return [record.settings for record in records]


def far_from_best(record: Record) -> float:
    return -abs(record.settings["a.x"] - 0.1)


def test_a_search_that_was_interrupted_makes_the_trials_of_one_that_was_not(tmp_path: Path) -> None:
    found = [
        run(root, begin(root), far_from_best, restarts)
        for restarts in (False, True)
        for root in [build(tmp_path / str(restarts), {"a": [], "b": ["a"]}, light=True).root]
    ]
    assert found[0] == found[1] and len(found[0]) == 8
    assert all(0.001 <= each["a.x"] <= 1 and each["a.n"] in range(2, 10) for each in found[0])  # type: ignore[operator]
    assert {str(each["a.k"]) for each in found[0]} == {"[1]", "[2]"}
    assert len({each["a.x"] for each in found[0]}) == 8


def test_a_trial_that_was_cut_short_goes_on_with_its_params(root: Path) -> None:
    chosen = begin(root)
    first = Search(root, chosen, []).take([])
    assert first is not None
    again = sweep.records(root, "s")
    plan = Search(root, chosen, again)
    record = plan.take([])
    assert record is again[0] and record.settings == first.settings
    other = plan.take([record])
    assert other is not None and other.number == 2


def test_a_trial_that_only_optuna_knows_is_a_point_too(root: Path) -> None:
    """A kill came after Optuna had chosen, before the point was written down."""
    chosen = begin(root)
    first = Search(root, chosen, []).take([])
    (sweep.place(root, "s") / "points" / "1.json").unlink()
    records: list[Record] = []
    plan = Search(root, chosen, records)
    assert first is not None and [record.settings for record in records] == [first.settings]
    assert plan.take([]) is records[0]


@pytest.mark.parametrize(("early", "bad"), [("a.loss:min", 9.0), ("a.gain", -9.0)])
def test_a_trial_that_begins_worse_than_most_is_given_up(early: str, bad: float, root: Path) -> None:
    chosen = begin(root, early=(early,))
    plan = Search(root, chosen, records := [])
    name = early.partition(":")[0].removeprefix("a.")
    for number in range(search.STARTUP):
        record = plan.take([])
        assert record is not None
        write(root / "tree", "a", **{name: 1.0 + number / 100})
        assert plan.worth_going_on(record, 0, root / "tree")
        settle(plan, record, root, 1.0)
    worse, better = plan.take([]), plan.take(records[-1:])
    assert worse is not None and better is not None
    write(root / "tree", "a", **{name: bad})
    assert not plan.worth_going_on(worse, 0, root / "tree")
    assert f"a.{name} = {bad:.4g} is worse than the median" in worse.message
    write(root / "tree", "a", **{name: -bad})
    assert plan.worth_going_on(better, 0, root / "tree")


def test_an_objective_that_is_not_there_ends_the_trial_and_not_the_search(root: Path) -> None:
    plan = Search(root, begin(root), [])
    record = plan.take([])
    assert record is not None
    write(root / "tree", "b", other=1.0)
    record.state = "done"
    with pytest.raises(UserError, match=r"b\.score: metrics/b\.json has no such number"):
        plan.settled(record, root / "tree")
    record.state = "failed"
    assert plan.take([]) is not None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": ""}, "--objective STAGE.KEY"),
        ({"objective": "score"}, "expected STAGE.KEY"),
        ({"objective": "b.score:up"}, "expected STAGE.KEY"),
        ({"objective": "c.score"}, "the stage c does not run; a, b do"),
        ({"early": ("c.loss",)}, "--early c.loss"),
        ({"settings": ("a.y=1,2",)}, "one value, or --search"),
    ],
)
def test_a_search_that_cannot_work_is_refused(changes: dict[str, object], told: str, root: Path) -> None:
    with pytest.raises(UserError, match=told):
        search.check(root, begin(root, **changes), ["a", "b"])
