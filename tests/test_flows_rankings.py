"""Runs that wait for people's rankings."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from label_toys import items, toy_that_waits
from toy import Toy, until

from flows import rankings, run, workspace
from tasks.labels.desk import Desk
from tasks.stage import UserError
from tasks.stage.errors import TryAgain

SECONDS = 240


@pytest.fixture(scope="module")
def unstarted(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy_that_waits(tmp_path_factory.mktemp("unstarted") / "toy")


@pytest.fixture
def toy(unstarted: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setenv("LIFECYCLE_TRACKING", "off")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    return unstarted.copy(tmp_path / "toy")


def settled(toy: Toy, wanted: rankings.Wanted) -> run.Run:
    """A run without Prefect, to its end."""
    planned = run.plan(toy.root, wanted=wanted)
    planned.settle_rest()
    planned.close()
    return planned


def give(toy: Toy, count: int, labeler: str = "ann") -> None:
    at = Desk(items(count), toy.root / rankings.ANSWERS, 1, 1.0, saved=lambda: None)
    for _ in range(count):
        shown = at.view(labeler)["item"]
        at.judge(labeler, shown["id"], "ranked", shown["answers"], [1, 2, 3], 1.0)


def test_a_run_goes_on_by_itself_as_soon_as_there_are_enough(toy: Toy, tmp_path: Path) -> None:
    give(toy, 2)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(settled, toy, rankings.Wanted(5, SECONDS, "stop"))
        until(lambda: toy.starts() == ["prepare"], "the stage before", SECONDS)
        time.sleep(2 * rankings.SECONDS_BETWEEN_LOOKS)
        assert not waiting.done()
        give(toy, 3, "bob")
        assert waiting.result(SECONDS).code == 0
    assert len((toy.root / rankings.RANKINGS).read_text().splitlines()) == 5
    assert toy.starts() == ["prepare", "prepare", "feedback", "reward"]  # rankings are an input of prepare too
    assert "up to date" in toy.dvc("status").stdout
    serial = Toy(Path(shutil.copytree(toy.root, tmp_path / "serial")), toy.graph)
    (serial.root / "dvc.lock").unlink()
    serial.dvc("repro")
    assert serial.lock() == toy.lock()


def test_at_the_deadline_it_ends_with_75_or_goes_on_as_set(toy: Toy) -> None:
    give(toy, 1)
    ended = settled(toy, rankings.Wanted(2, 0.1, "stop"))
    assert (ended.code, ended.results["feedback"].state) == (75, "failed")
    assert ended.results["feedback"].message.startswith("1 of 2 rankings are there and the time is over")
    assert toy.starts() == ["prepare"]
    assert settled(toy, rankings.Wanted(2, 0.1, "go-on")).code == 0
    assert len((toy.root / rankings.RANKINGS).read_text().splitlines()) == 1
    before = toy.starts()
    assert settled(toy, rankings.Wanted(1, None, "stop")).code == 0  # enough, and nothing is new
    assert toy.starts() == before


def test_a_stop_ends_the_waiting(toy: Toy) -> None:
    planned = run.plan(toy.root, wanted=rankings.Wanted(2, None, "stop"))
    planned.stop.set()
    planned.settle_rest()
    assert planned.code == run.INTERRUPTED


def test_to_wait_in_vain_is_refused(toy: Toy) -> None:
    with pytest.raises(UserError, match="2 weeks: expected a number with s, m, h or d"):
        rankings.duration("2 weeks")
    with pytest.raises(UserError, match="feedback is not among the stages of this run"):
        run.plan(toy.root, ["prepare"], wanted=rankings.Wanted(1, None, "stop"))
    toy.set("feedback", source={"kind": "oracle"})
    with pytest.raises(UserError, match="add --preset labelled"):
        run.plan(toy.root, wanted=rankings.Wanted(1, None, "stop"))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5m", 90), ("12h", 43200), ("2d", 172800)])
def test_durations(text: str, seconds: float) -> None:
    assert rankings.duration(text) == seconds


def test_nothing_is_collected_under_a_run(toy: Toy) -> None:
    give(toy, 1)
    with workspace.locked(toy.root):
        assert not rankings.collect_unless_running(toy.root)
        assert not (toy.root / rankings.RANKINGS).exists()
        with pytest.raises(TryAgain), workspace.locked(toy.root):
            pass
    assert rankings.collect_unless_running(toy.root)
    assert (toy.root / rankings.RANKINGS).exists()
