"""Runs that wait for people's rankings."""

import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from label_toys import items
from test_flows_lifecycle import ask, start_server
from toy import Toy, build, until

from flows import rankings, run, workspace
from tasks.labels.desk import Desk
from tasks.stage import UserError
from tasks.stage.errors import TryAgain

SECONDS = 240
PARAMS = """\
from typing import Any

from tasks.stage import Section


class Params(Section):
    source: dict[str, Any]
"""


@pytest.fixture(scope="module")
def unstarted(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Stages by the names of the real ones, the first two of which read inputs/."""
    toy = build(
        tmp_path_factory.mktemp("unstarted") / "toy",
        {"prepare": [], "feedback": ["prepare"], "reward": ["feedback"]},
        light=True,
    )
    (toy.root / "inputs").mkdir()
    (toy.root / "inputs" / "README.md").write_text("data of your own\n")
    graph = yaml.safe_load((toy.root / "dvc.yaml").read_text())
    for name in ("prepare", "feedback"):
        graph["stages"][name]["deps"].append("inputs")
    (toy.root / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    (toy.root / "tasks" / "feedback.py").write_text(PARAMS)
    params = toy.params() | {"feedback": {"source": {"kind": "rankings"}}}
    (toy.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return toy


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
        at.judge(labeler, shown["id"], "ranked", [1, 2, 3], 1.0)


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


def test_a_run_that_finds_enough_does_not_wait(toy: Toy) -> None:
    give(toy, 3)
    assert settled(toy, rankings.Wanted(3, None, "stop")).code == 0
    before = toy.starts()
    assert settled(toy, rankings.Wanted(3, None, "stop")).code == 0
    assert toy.starts() == before


def test_at_the_deadline_it_ends_with_75_or_goes_on_as_set(toy: Toy) -> None:
    give(toy, 1)
    ended = settled(toy, rankings.Wanted(2, 0.1, "stop"))
    assert (ended.code, ended.results["feedback"].state) == (75, "failed")
    assert ended.results["feedback"].message.startswith("1 of 2 rankings are there and the time is over")
    assert toy.starts() == ["prepare"]
    assert settled(toy, rankings.Wanted(2, 0.1, "go-on")).code == 0
    assert len((toy.root / rankings.RANKINGS).read_text().splitlines()) == 1


def test_a_stop_ends_the_waiting(toy: Toy) -> None:
    planned = run.plan(toy.root, wanted=rankings.Wanted(2, None, "stop"))
    planned.stop.set()
    planned.settle_rest()
    assert planned.code == run.INTERRUPTED


def test_to_wait_in_vain_is_refused(toy: Toy) -> None:
    refused = [
        (("--deadline", "2 weeks"), "--deadline 2 weeks: expected a number with s, m, h or d"),
        (("--stage", "prepare"), "--wait-for-rankings: feedback is not among the stages of this run"),
    ]
    for options, said in refused:
        assert said in toy.lifecycle("run", "--wait-for-rankings", "3", *options, code=2).stderr
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


def test_prefect_shows_the_pause_with_the_page_and_can_end_it(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rankings.note_path(toy.root).write_text("http://127.0.0.1:7861")
    with start_server(toy.root, tmp_path / "prefect") as url:
        process = toy.start("run", "--wait-for-rankings", "9", PREFECT_API_URL=url)

        def state() -> dict[str, Any]:
            runs = ask(url, "flow_runs")
            return runs[0]["state"] if runs else {"type": ""}

        until(lambda: state()["type"] == "PAUSED", "the pause", SECONDS)
        assert state()["message"] == (
            "waiting for 9 rankings, 0 are there: rank answers at http://127.0.0.1:7861"
        )
        assert toy.starts() == ["prepare"]
        resume = f"{url}/flow_runs/{ask(url, 'flow_runs')[0]['id']}/resume"
        urllib.request.urlopen(
            urllib.request.Request(resume, b"{}", {"Content-Type": "application/json"})
        ).close()
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output
        assert state()["type"] == "COMPLETED"
    assert toy.starts() == ["prepare", "feedback", "reward"]
