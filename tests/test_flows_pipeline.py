"""Reading the graph: order, reasons for change, and what DVC's words mean. Nothing is run by Prefect here."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import Toy, build

from flows import pipeline, workspace
from flows.pipeline import Change, StageError
from flows.run import Run, plan
from tasks.stage.errors import TryAgain, UserError

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC's pygtrie


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    toy = build(tmp_path_factory.mktemp("toy") / "toy", {"c": ["a", "b"], "b": ["a"], "a": []}, light=True)
    toy.dvc("repro")
    return toy


@pytest.fixture
def toy(finished: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    copy = finished.copy(tmp_path / "toy")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(copy.root / ".work" / "dvc"))
    return copy


def edit(toy: Toy, stage: str, **values: Any) -> None:
    """Change keys of a stage in dvc.yaml."""
    path = toy.root / "dvc.yaml"
    graph = yaml.safe_load(path.read_text())
    graph["stages"][stage].update(values)
    path.write_text(yaml.safe_dump(graph, sort_keys=False))


def why(toy: Toy) -> dict[str, list[str]]:
    found = pipeline.changes(toy.root, list(pipeline.read_graph(toy.root)))
    return {name: [str(change) for change in changes] for name, changes in found.items() if changes}


def test_parents_come_first_and_options_are_read(toy: Toy) -> None:
    edit(toy, "b", meta={"retries": 0, "timeout": 60, "gpu": True, "show": ["length"]})
    graph = pipeline.read_graph(toy.root)
    assert list(graph) == ["a", "b", "c"]
    assert graph["c"].parents == ("a", "b")
    assert graph["b"].meta == pipeline.Meta(retries=0, retry_delay=5.0, timeout=60, gpu=True, show=("length",))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"retrys": 1}, "dvc.yaml: b.meta.retrys: unknown key; did you mean retries?"),
        ({"retries": "two"}, 'dvc.yaml: b.meta.retries: found "two", expected a valid integer'),
        ({"timeout": -1}, "dvc.yaml: b.meta.timeout: found -1, expected greater than 0"),
        ({"gpu": "yes"}, 'dvc.yaml: b.meta.gpu: found "yes", expected a valid boolean'),
        ({"show": "loss"}, 'dvc.yaml: b.meta.show: found "loss", expected a valid array'),
        ("gpu", "dvc.yaml: b.meta: expected keys (retries, "),
    ],
)
def test_wrong_options_are_told_in_one_line(meta: Any, message: str, toy: Toy) -> None:
    edit(toy, "b", meta=meta)
    with pytest.raises(UserError) as raised:
        pipeline.read_graph(toy.root)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_broken_graph_is_told_in_one_line(toy: Toy) -> None:
    edit(toy, "a", outs=["data/b.txt"])
    with pytest.raises(UserError, match=r"output 'data/b\.txt' is specified in") as raised:
        pipeline.read_graph(toy.root)
    assert "\n" not in str(raised.value)


def test_nothing_changed(toy: Toy) -> None:
    assert why(toy) == {}


def test_each_kind_of_change_has_its_reason(toy: Toy) -> None:
    toy.set("b", text="other")
    assert why(toy) == {"b": ['param b.text "b" → "other"']}
    (toy.root / "tasks" / "a.py").write_text("# changed\n")
    (toy.root / "data" / "c.txt").unlink()
    assert why(toy) == {
        "a": ["input tasks/a.py modified"],
        "b": ['param b.text "b" → "other"'],
        "c": ["output data/c.txt deleted"],
    }
    edit(toy, "a", cmd="true")
    assert why(toy)["a"] == ["its command changed", "input tasks/a.py modified"]
    (toy.root / "dvc.lock").unlink()
    assert why(toy) == {"a": ["never run"], "b": ["never run"], "c": ["never run"]}


def test_a_key_that_came_or_went_is_a_change(toy: Toy) -> None:
    params = toy.params()
    del params["b"]["text"]
    params["b"]["words"] = 3
    (toy.root / "params.yaml").write_text(yaml.safe_dump(params))
    assert why(toy) == {"b": ['param b.text "b" → not there', "param b.words not there → 3"]}


def test_a_plan_names_what_is_due_and_what_may_follow(toy: Toy) -> None:
    assert plan(toy.root).title == "nothing to do"
    toy.set("a", text="other")
    run = plan(toy.root)
    assert (run.title, run.due) == ("a +2", {"a", "b", "c"})
    assert plan(toy.root, ["b"]).due == {"a", "b"}
    assert set(plan(toy.root, ["b"], alone=True).stages) == {"b"}
    forced = plan(toy.root, ["b"], force=True)
    assert (forced.forced, forced.title) == ({"b"}, "a, b (forced)")
    assert list(forced.stages) == ["a", "b"]
    with pytest.raises(UserError, match=r"--stage d: no such stage in dvc\.yaml; it has a, b, c"):
        plan(toy.root, ["d"])


def test_without_prefect_the_stages_run_one_after_the_other(toy: Toy) -> None:
    """As when Prefect is lost at the start. A parent that made the same again lets its children be."""
    toy.forget_starts()
    toy.set("a", text="other")  # a light stage writes its name, whatever its params
    run = settled(toy)
    assert {name: result.state for name, result in run.results.items()} == {
        "a": "done",
        "b": "cached",
        "c": "cached",
    }
    assert toy.starts() == ["a"]
    assert run.code == 0


def test_a_failure_stops_what_depends_on_it(toy: Toy) -> None:
    edit(toy, "b", cmd="echo 'no luck'; exit 3")
    run = settled(toy)
    assert {name: result.state for name, result in run.results.items()} == {
        "a": "cached", "b": "failed", "c": "not run",
    }  # fmt: skip
    assert (run.results["b"].code, run.results["b"].message) == (3, "no luck")
    assert run.code == 3


def settled(toy: Toy) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in toy.environment({}).items():
            patch.setenv(name, value)
        run = plan(toy.root)
        run.settle_rest()
        run.close()
    return run


def test_dvc_lock_is_put_in_the_order_of_the_graph(toy: Toy) -> None:
    path = toy.root / "dvc.lock"
    right = path.read_bytes()
    lock = toy.lock()
    lock["stages"] = dict(reversed(lock["stages"].items()))
    path.write_text(yaml.safe_dump(lock, sort_keys=False))
    pipeline.order_lock(toy.root)
    assert path.read_bytes() == right


def test_a_stage_that_starts_does_not_show_how_far_an_earlier_run_came(toy: Toy) -> None:
    """The stages of this toy say nothing of their progress."""
    progress = toy.root / ".work" / "a" / "progress.json"
    progress.parent.mkdir()
    progress.write_text('{"description": "a", "done": 7, "total": 7}')
    toy.settle()
    assert pipeline.progress_record(toy.root, "a"), "nothing has run"
    edit(toy, "a", cmd="mkdir -p data && echo anew > data/a.txt")
    assert toy.settle().code == 0
    assert pipeline.progress_record(toy.root, "a") == {}


@pytest.mark.parametrize(
    ("code", "worth"), [(1, True), (75, True), (137, True), (124, True), (2, False), (3, False), (130, False)]
)
def test_which_failures_are_worth_a_retry(code: int, worth: bool) -> None:
    assert StageError("a", code, "", Path("log")).worth_retrying is worth


def test_a_change_reads_well() -> None:
    assert str(Change("always")) == "it always runs"


def test_a_second_run_is_sent_away(tmp_path: Path) -> None:
    """The lock belongs to a process: the other run is one."""
    code = (
        "import sys, pathlib; from flows import workspace; root = pathlib.Path(sys.argv[1])\n"
        "with workspace.locked(root): print('held', flush=True); sys.stdin.read()"
    )
    (tmp_path / ".work").mkdir()
    with subprocess.Popen(
        ["python", "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        with pytest.raises(TryAgain, match=f"process {other.pid}"), workspace.locked(tmp_path):
            pass
        other.stdin.close()
        with workspace.locked(tmp_path, wait=True):
            assert other.wait(timeout=10) == 0
