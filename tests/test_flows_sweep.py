"""Sweeps through the command line, on toys: what runs how often, what a failure or a kill does."""

import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
from prefect_server import PrefectServer
from rich.console import Console
from toy import Toy, build, until

from flows import point, snapshot, sweep, sweep_display
from flows.processes import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC's pygtrie
OUTCOMES = "b.outcome=wrong data,good,again once"


@pytest.fixture(scope="module", autouse=True)
def recorded(prefect_server: PrefectServer, prefect_home: Path) -> Iterator[None]:
    """The sweeps are recorded by the server that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(prefect_home))
        patch.setenv("PREFECT_API_URL", prefect_server.url)
        yield


def git(root: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "toy" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *arguments], cwd=root, env={**os.environ, **names}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def trees(toy: Toy, name: str) -> list[Toy]:
    """The work trees of a sweep, as toys."""
    return [
        Toy(path.parent, toy.graph) for path in sorted((toy.root / ".work/sweeps" / name).glob("*/dvc.yaml"))
    ]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, dict[str, Any]]:
    """A sweep of three points side by side that share their first stage; one of them fails.

    The workspace has a commit, and a change and a new file that are not in it.
    """
    toy = build(tmp_path_factory.mktemp("swept") / "toy", {"a": [], "b": ["a"]})
    git(toy.root, "add", ".")
    git(toy.root, "commit", "--quiet", "--message", "all")
    toy.set("a", text="changed")
    (toy.root / "notes.txt").write_text("new")
    done = toy.lifecycle("sweep", "--set", OUTCOMES, "--name", "s", "--jobs", "3", "--keep", "--json", code=2)
    return toy, json.loads(done.stdout)


def test_a_stage_that_is_equal_in_all_points_runs_once(swept: tuple[Toy, dict[str, Any]]) -> None:
    toy, _ = swept
    starts = [stage for tree in trees(toy, "s") for stage in tree.starts()]
    assert starts.count("a") == 1
    assert starts.count("b") == 4, "once in each point, and once more where it was to be tried again"


def test_the_stages_of_all_points_would_be_forked_from_one_process(swept: tuple[Toy, dict[str, Any]]) -> None:
    """One point alone would name its own."""
    toy, _ = swept
    found = set().union(*(tree.forked_for() for tree in trees(toy, "s")))
    assert len(found) == 1 and "None" not in found


def test_two_points_that_need_the_same_stage_take_turns(tmp_path: Path) -> None:
    """The one that comes second would find the outputs of the first; a stop ends its wait."""
    one, other = (build(tmp_path / name, {"a": []}) for name in ("one", "other"))
    (tmp_path / "locks").mkdir()
    here = point.Point("s", 1, "1", {}, str(tmp_path / "locks"))
    stop = Event()
    stop.set()
    with point.once(here, "a", one.root, stop):
        with pytest.raises(Stopped), point.once(here, "a", other.root, stop):
            pass
        other.set("a", text="changed")
        with point.once(here, "a", other.root, stop):
            pass


def test_one_failure_leaves_the_others(swept: tuple[Toy, dict[str, Any]]) -> None:
    _, result = swept
    points = {point["settings"]["b.outcome"]: point for point in result["points"]}
    assert {name: point["state"] for name, point in points.items()} == {
        "wrong data": "failed", "good": "done", "again once": "done",
    }  # fmt: skip
    assert points["wrong data"]["message"] == "b: row 7: output is empty; fill it in"
    assert points["good"]["name"] == "2-good"
    assert sorted(point["stages"]["a"] for point in result["points"]) == ["done", "restored", "restored"]
    assert points["good"]["metrics"] == {"b.length": 11, "b.words": 2}


def test_uncommitted_changes_come_along_and_nothing_here_is_touched(swept: tuple[Toy, dict[str, Any]]) -> None:
    toy, result = swept
    for tree in trees(toy, "s"):
        assert (tree.root / "notes.txt").read_text() == "new"
        assert tree.params()["a"]["text"] == "changed"
    assert toy.params()["b"]["outcome"] == "good"
    assert git(toy.root, "status", "--porcelain").splitlines() == ["M params.yaml", "?? notes.txt"]
    assert not (toy.root / "data").exists()
    commit = next(point["commit"] for point in result["points"] if point["commit"])
    assert git(toy.root, "log", "--format=%s", commit).splitlines()[-1] == "all"


def test_a_point_that_is_applied_is_up_to_date(swept: tuple[Toy, dict[str, Any]], tmp_path: Path) -> None:
    toy, _ = swept
    toy.lifecycle("apply", "s/2")
    stages = json.loads(toy.lifecycle("status", "--json").stdout)["stages"]
    assert [stage["state"] for stage in stages] == ["up to date", "up to date"]
    assert toy.output("b") == "b: b\na: changed\n"
    toy.lifecycle("apply", "s/3-again-once")
    assert toy.params()["b"]["outcome"] == "again once", "params of another point are no change of one's own"
    assert toy.starts() == []

    toy.set("b", text="mine")
    refused = toy.lifecycle("apply", "s/2", code=2).stderr
    assert "params.yaml has changes" in refused and "--force" in refused
    assert toy.params()["b"]["text"] == "mine"
    toy.lifecycle("apply", "s/2", "--force")
    assert toy.params()["b"]["text"] == "b"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sweep"], "nothing to try"),
        (["sweep", "--set", "b.txt=1"], 'b.txt: no such key; did you mean b.text?'),
        (["sweep", "--set", "b.text=x,1"], "b.text=1: params.yaml: b.text: found 1"),
        (["sweep", "--set", "b.text=x", "--stage", "z"], "--stage z: no such stage"),
        (["sweep", "--set", "b.text=x", "--preset", "z"], "--preset z: no such preset"),
        (["sweep", "--set", "b.text=x", "--name", "../up"], "--name ../up"),
        (["sweep", "--set", "b.text=x", "--name", "s"], "--name s: that sweep tries something else"),
        (["sweep", "--set", "b.text=x", "--objective", "b.words"], "belong to a search"),
        (["sweep", "--continue", "z"], "no sweep z; there are: s"),
        (["apply", "s"], "expected NAME/POINT"),
        (["apply", "s/9"], "sweep s has no point 9; it has 1-wrong-data"),
        (["apply", "s/1"], "point 1-wrong-data is failed"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(
    arguments: list[str], told: str, swept: tuple[Toy, dict[str, Any]]
) -> None:
    done = swept[0].lifecycle(*arguments, code=2)
    assert told in done.stderr and done.stderr.count("\n") == 1


def test_a_sweep_that_is_killed_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    toy = build(tmp_path / "toy", {"a": [], "b": ["a"]})
    command = ["sweep", "--set", "b.outcome=good,wait", "--keep"]
    running = toy.start(*command)
    folders = toy.root / ".work" / "sweeps"
    until(lambda: any(folders.glob("*/2-wait/.work/b.begun")), "the second point", 100)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    (name,) = sweep.names(toy.root)
    first, second = trees(toy, name)
    until(lambda: not any(map(psutil.pid_exists, second.processes())), "the stage to end", 100)
    assert second.record("b")["exit_code"] == 143, "it was asked to end, and could save its checkpoint"

    second.go()
    again = toy.lifecycle(*command, "--json")
    result = json.loads(again.stdout)
    assert result["name"] == name, "the same command is the same sweep"
    assert [point["state"] for point in result["points"]] == ["done", "done"]
    assert first.starts() == ["a", "b"] and second.starts() == ["b", "b"]
    toy.lifecycle("sweep", "--remove", name)
    assert sweep.names(toy.root) == [] and git(toy.root, "worktree", "list").count("\n") == 0
    assert git(toy.root, "for-each-ref", "refs/lifecycle") == ""


@pytest.mark.parametrize("ignored", [True, False])
def test_a_snapshot_leaves_out_what_is_ignored_and_local_settings(ignored: bool, tmp_path: Path) -> None:
    toy = build(tmp_path / "toy", {"a": []}, light=True)
    (toy.root / ".dvc" / "config.local").write_text("secret")
    (toy.root / "data").mkdir()
    (toy.root / "data" / "a.txt").write_text("ignored")
    if ignored:
        (toy.root / ".dvc" / ".gitignore").write_text("/config.local\n")
    commit = snapshot.take(toy.root, "x")
    kept = snapshot.files(toy.root, commit, ["."])
    assert "params.yaml" in kept and not {".dvc/config.local", "data/a.txt"} & set(kept)
    git(toy.root, "add", ".gitignore")
    git(toy.root, "commit", "--quiet", "--message", "one file")
    assert snapshot.files(toy.root, snapshot.take(toy.root, "x"), ["."]) == kept
    assert git(toy.root, "status", "--porcelain").splitlines()[0].startswith("??"), "the index is as it was"


def test_a_snapshot_outside_git_or_with_large_new_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = build(tmp_path / "toy", {"a": []}, light=True)
    monkeypatch.setattr(snapshot, "UNTRACKED_MEGABYTES", 0.5)
    (toy.root / "big.bin").write_bytes(b"0" * 1_000_000)
    with pytest.raises(snapshot.UserError, match=r"1 MB of new files .*big\.bin"):
        snapshot.take(toy.root, "x")
    inner = toy.root / "inner"
    inner.mkdir()
    with pytest.raises(snapshot.UserError, match="not the top"):
        snapshot.take(inner, "x")
    with pytest.raises(snapshot.UserError, match="no git repository"):
        snapshot.take(tmp_path, "x")


def test_on_a_narrow_terminal_no_name_of_a_metric_is_cut(tmp_path: Path) -> None:
    names = ["ppo.reward_after", "ppo.share_of_gain", "ppo.guard_events", "evaluate.finetune.rougeL"]
    row = {
        "point": 1, "name": "s/1", "settings": {"ppo.kl.beta": 0.05}, "state": "done", "seconds": 61.2,
        "message": "", "metrics": dict.fromkeys(names, 0.1234),
    }  # fmt: skip
    printed = io.StringIO()
    console = Console(width=80, file=printed)
    other = {**row, "point": 2, "settings": {"ppo.kl.beta": 0.2}}
    sweep_display.show(tmp_path, sweep.Sweep("s", "abc"), [row, other], console)
    head = [line.split() for line in printed.getvalue().splitlines()[:3]]
    assert head == [
        ["ppo.", "ppo.", "ppo.", "evaluate."], ["reward_", "share_of_", "guard_", "finetune."],
        ["point", "ppo.kl.beta", "state", "time", "after", "gain", "events", "rougeL"],
    ]  # fmt: skip
