"""DVC and the flow, killed or out of disk at each step of a commit. The work is the same without Prefect."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from faults import FULL, KILL, after, before, fault
from toy import Toy, build, until

from flows import verify

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC's pygtrie
RUN = "from pathlib import Path; from flows.run import plan; plan(Path.cwd()).settle_rest()"
# An output is hashed, the run-cache learns of it, it is moved into the cache, and dvc.lock is written.
HALF_A_LOCK = f"""
def _dump(data, stream):
    text = io.StringIO()
    _get_yaml().dump(data, text)
    locked = "dvc.lock" in str(stream.name)
    stream.write(text.getvalue()[: 40 if locked else None])
    stream.flush()
    if locked:
        {KILL}
"""
MOMENTS = {
    "before an output is hashed": ("dvc.stage", before("Stage.save", KILL)),
    "before an output is cached": ("dvc.stage", before("Stage.commit", KILL)),
    "before a cached output has its name": ("dvc_objects.fs.utils", before("shutil.move", KILL)),
    "before the lock is written": ("dvc.stage", after("Stage.commit", KILL)),
    "while the lock is written": ("dvc.utils.serialize._yaml", HALF_A_LOCK),
}


@pytest.fixture(scope="module")
def unstarted(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return build(tmp_path_factory.mktemp("unstarted") / "toy", {"a": [], "b": ["a"]}, light=True)


@pytest.fixture(scope="module")
def undisturbed(unstarted: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The repository after a run that nothing went wrong in."""
    toy = unstarted.copy(tmp_path_factory.mktemp("undisturbed") / "toy")
    toy.dvc("repro")
    return toy


@pytest.fixture
def toy(unstarted: Toy, tmp_path: Path) -> Toy:
    return unstarted.copy(tmp_path / "toy")


def assert_as_undisturbed(toy: Toy, undisturbed: Toy) -> None:
    assert toy.lock() == undisturbed.lock()
    assert [toy.output(name) for name in toy.graph] == [undisturbed.output(name) for name in toy.graph]
    assert verify.damaged(toy.root) == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_dvc_killed_in_its_commit(moment: str, toy: Toy, undisturbed: Toy, tmp_path: Path) -> None:
    killed = toy.settle(**fault(tmp_path, *MOMENTS[moment]))
    result = killed.results["a"]
    assert (result.state, result.code, result.message) == ("failed", 137, "DVC was killed by signal 9")
    assert toy.starts() == ["a"]
    assert killed.results["b"].state == "not run"

    assert toy.settle().code == 0
    assert toy.starts()[-1] == "b"
    assert_as_undisturbed(toy, undisturbed)


def test_the_flow_killed_while_dvc_commits(toy: Toy, undisturbed: Toy, tmp_path: Path) -> None:
    note = "__import__('pathlib').Path('.work/dvc.pid').write_text(f'{os.getpid()}.')"
    wait = before("Stage.commit", f"{note}; __import__('signal').pause()")
    environment = toy.environment(fault(tmp_path, "dvc.stage", wait))
    flow = subprocess.Popen([sys.executable, "-c", RUN], cwd=toy.root, env=environment)
    written = toy.root / ".work" / "dvc.pid"
    until(lambda: written.exists() and written.read_text().endswith("."), "DVC to commit")
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    dvc = int(written.read_text().rstrip("."))
    until(lambda: not _runs(dvc), "DVC to end", seconds=20)

    assert toy.settle().code == 0
    assert_as_undisturbed(toy, undisturbed)


@pytest.mark.parametrize("kept", [True, False])
def test_a_disk_that_is_full_when_dvc_commits(kept: bool, tmp_path: Path) -> None:
    """The stage's work is not lost: with room again, one command keeps it; without that it is done again."""
    toy = build(tmp_path / "toy", {"a": []})
    undisturbed = toy.copy(tmp_path / "undisturbed")
    undisturbed.dvc("repro")
    full = fault(tmp_path, "dvc_objects.fs.utils", before("shutil.move", FULL))
    failed = toy.settle(**full).results["a"]
    assert (failed.state, failed.code, failed.attempts) == ("failed", 75, 1)
    assert failed.message == (
        "No space left on device: make room, and `dvc commit --force a` keeps what the stage has made"
    )
    if kept:
        toy.call(["sh", "-c", failed.message.split("`")[1]], 0, {})
    assert toy.settle().code == 0
    assert toy.starts() == (["a"] if kept else ["a", "a"])
    assert_as_undisturbed(toy, undisturbed)


def test_a_disk_that_is_full_before_a_stage_starts(toy: Toy, undisturbed: Toy, tmp_path: Path) -> None:
    full = toy.settle(**fault(tmp_path, "dvc.stage", before("Stage.remove_outs", FULL))).results["a"]
    assert (full.code, full.message) == (75, "No space left on device: make room and run again")
    assert toy.starts() == []
    assert toy.settle().code == 0
    assert_as_undisturbed(toy, undisturbed)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
