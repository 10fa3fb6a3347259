"""`lifecycle compare`: what it can be given, what differs, which differences are called real, and its pages."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from toy import Toy, build

from flows import compare, compare_command, compare_page, mlflow_view, sources, sweep
from flows.compare import Number
from flows.sources import Side
from flows.sweep import Record, Sweep
from tasks.registry import store
from tasks.stage import UserError, tracking

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC's pygtrie


def git(root: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "toy" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *arguments], cwd=root, env={**os.environ, **names}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def write(root: Path, **metrics: float) -> None:
    (root / "metrics").mkdir(exist_ok=True)
    (root / "metrics" / "b.json").write_text(json.dumps(metrics))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A repository with a commit, and a workspace of other params and metrics."""
    toy = build(tmp_path / "toy", {"a": [], "b": ["a"]}, light=True)
    write(toy.root, score=0.5, score_low=0.4, score_high=0.6, words=3)
    git(toy.root, "add", ".")
    git(toy.root, "commit", "--quiet", "--message", "first")
    git(toy.root, "tag", "v1")
    toy.set("b", text="another")
    write(toy.root, score=0.8, score_low=0.7, score_high=0.9, words=3)
    monkeypatch.chdir(toy.root)
    return toy


def side(label: str, **metrics: float) -> Side:
    return Side(label, "git", {}, {f"b.{name}": value for name, value in metrics.items()})


def test_a_revision_and_the_workspace(toy: Toy) -> None:
    found = compare_command.run(toy.root, ["v1", "."], [], quiet=True)
    assert found["params"] == {"b.text": ["b", "another"]}
    assert list(found["metrics"]) == ["b.score"] and found["equal_metrics"] == 1
    first, second = found["metrics"]["b.score"]
    assert (first["value"], first["apart"]) == (0.5, None)
    assert (second["value"], second["low"], second["high"], second["apart"]) == (0.8, 0.7, 0.9, True)
    assert found["view"] is None, "nothing of it is in MLflow"
    assert (toy.root / found["page"]).is_file()


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [((0.1, 0.2), (0.3, 0.4), True), ((0.3, 0.4), (0.1, 0.2), True), ((0.1, 0.3), (0.3, 0.4), False),
     ((0.1, 0.9), (0.3, 0.4), False)],
)  # fmt: skip
def test_intervals_with_a_point_in_common_are_not_apart(
    one: tuple[float, float], other: tuple[float, float], expected: bool
) -> None:
    assert compare.apart(one, other) is expected


def test_a_number_without_interval_has_no_verdict_and_an_equal_one_says_so() -> None:
    sides = [
        side("x", s=0.5, s_low=0.4, s_high=0.6, t=1.0),
        side("y", s=0.5, s_low=0.4, s_high=0.6, t=2.0),
        side("z", s=0.55, s_low=0.45, s_high=0.65),
    ]
    found = compare.compare(sides, ["b.s", "b.t"])
    assert [compare.mark(number) for number in found.metrics["b.s"]] == [" ", "=", "≈"]
    assert [number and compare.mark(number) for number in found.metrics["b.t"]] == [" ", " ", None]


def test_metrics_are_chosen_by_pattern_and_ends_of_intervals_are_no_metrics() -> None:
    sides = [side(name, rouge=1.0, rouge_low=0.9, rouge_high=1.1, bleu=0.1) for name in "xy"]
    assert compare.shown(sides, {}, ["*.rouge*"]) == ["b.rouge"]
    assert compare.shown(sides, {}, ["c.*"]) == []


def test_a_point_of_a_sweep_has_the_stages_that_ran(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics of other stages in its commit are those of the workspace before."""
    chosen = Sweep("s", git(toy.root, "rev-parse", "HEAD"), settings=("b.text=b",))
    (sweep.place(toy.root, "s") / "points").mkdir(parents=True)
    (sweep.place(toy.root, "s") / "sweep.json").write_text(json.dumps({"name": "s", "base": chosen.base}))
    for number, stages in ((1, {"a": "done", "b": "restored"}), (2, {"a": "done"})):
        sweep.keep(toy.root, "s", Record(number, f"{number}-x", {}, "done", commit=chosen.base, stages=stages))
    both = sources.sides(toy.root, "s")
    assert [each.label for each in both] == ["s/1-x", "s/2-x"]
    assert both[0].metrics["b.score"] == 0.5 and both[1].metrics == {}
    assert sources.sides(toy.root, "s/2")[0].label == "s/2-x"


def test_a_registered_version(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"lineage.json": {"params": {"b": {"text": "b"}}}, "evaluate.json": {"tuned": {"rougeL": 0.9}}}
    version = store.Version("model", "7", ("champion",), {})
    monkeypatch.setattr(
        store, "look", lambda name, wanted: version if (name, wanted) == ("model", "7") else None
    )
    monkeypatch.setattr(store, "read", lambda _, file: json.dumps(files[file]))
    (found,) = sources.sides(toy.root, "models:model/7")
    assert (found.label, found.params["b.text"]) == ("model version 7", "b")
    assert found.metrics == {"evaluate.tuned.rougeL": 0.9}
    with pytest.raises(UserError, match="there is no such registered version"):
        sources.sides(toy.root, "models:model/8")


def test_runs_of_pipelines_by_the_beginning_of_their_ids(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(start: str, params: dict[str, str], **tags: str) -> tracking.KnownRun:
        return tracking.KnownRun(start.ljust(32, "0"), start, params, {"b.score": int(start[-1]) / 10}, tags)

    runs = {
        "abcd1": recorded("abcd1", {"b.text": "b", "b.n": "5.0"}),
        "abcd2": recorded("abcd2", {"b.text": "None", "b.n": "5"}),
        "abcd3": recorded("abcd3", {}, **{"mlflow.parentRunId": "f00d"}),
    }
    monkeypatch.setattr(
        tracking, "runs_by_id", lambda start: [run for run in runs.values() if run.id.startswith(start)]
    )
    kept: dict[str, Any] = {}
    monkeypatch.setattr(tracking, "share_view", lambda key, state: kept.update({key: state}) or "1")
    found = compare_command.run(toy.root, ["abcd1", "run:abcd2"], [], quiet=True)
    assert found["params"] == {"b.text": ["b", "null"]}, "5.0 and 5 are one number"
    ((key, state),) = kept.items()
    assert found["view"].startswith("http://127.0.0.1:5000/#/experiments/1/runs?")
    assert found["view"].endswith(f"viewStateShareKey={key}")
    assert runs["abcd1"].id in state["searchFilter"] and runs["abcd2"].id in state["searchFilter"]
    assert state["selectedColumns"] == ["params.`b.text`", "metrics.`b.score`"]
    with pytest.raises(UserError, match="begins the ids of 3"):
        sources.sides(toy.root, "abcd")
    with pytest.raises(UserError, match="run of one stage; that of its pipeline is f00d"):
        sources.sides(toy.root, "abcd3")
    git(toy.root, "tag", "abcd1")
    with pytest.raises(UserError, match="write git:abcd1 or run:abcd1"):
        sources.sides(toy.root, "abcd1")


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (["nothing"], "nothing is no sweep, git revision, MLflow run or registered version"),
        (["git:nothing"], "there is no such git revision"),
        (["v1"], "nothing to compare with v1"),
        ([".", "."], "nothing to compare with workspace"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(wanted: list[str], told: str, toy: Toy) -> None:
    with pytest.raises(UserError, match=told):
        compare_command.run(toy.root, wanted, [], quiet=True)


def test_a_pattern_that_fits_nothing_is_refused(toy: Toy) -> None:
    with pytest.raises(UserError, match=r"--metric c\.\*"):
        compare_command.run(toy.root, ["v1", "."], ["c.*"], quiet=True)


def test_the_page_escapes_what_comes_from_data_and_needs_no_network() -> None:
    evil = '<script>alert("x")</script>'
    sides = [Side(evil, "git", {"a.b": evil}, {}), Side("y", "git", {}, {})]
    page = compare_page.html(compare.compare(sides, []), 'http://127.0.0.1:5000/#/"><script>')
    assert "<script" not in page and "default-src 'none'" in page


def test_the_picture_has_a_row_for_each_interval() -> None:
    sides = [side("x", s=0.2, s_low=0.1, s_high=0.3), side("y", s=0.7, s_low=0.6, s_high=0.8)]
    page = compare_page.html(compare.compare(sides, ["b.s"]), None)
    assert page.count('class="mark') == 2 and str(Number(0.7, 0.6, 0.8)) in page


def test_mlflows_view_lists_pipelines_alone() -> None:
    state = mlflow_view.view(["r1", "r2"], ["a.x"], ["b.s", "b.t"])
    assert state["searchFilter"] == "attributes.run_id IN ('r1', 'r2')"
    kinds = [chart["type"] for chart in state["compareRunCharts"]]
    assert kinds == ["PARALLEL", "BAR", "BAR"]
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {"comparison"}
