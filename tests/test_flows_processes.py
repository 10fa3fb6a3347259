"""Child processes: nothing of them is left, and orphans are told from those that somebody else runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Timer

import psutil
import pytest
from toy import until

from flows import child, processes

HOLD = """\
import sys, time
from pathlib import Path
from tasks.stage.lock import Lock
lock = Lock(Path(sys.argv[1]))
assert lock.acquire()
time.sleep(60)
"""
FAMILY = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
)


def run(code: str, folder: Path, seconds: float | None = None, stop: Event | None = None) -> int:
    return processes.run(
        [sys.executable, "-c", code],
        folder=folder,
        environment=dict(os.environ),
        log=folder / "log",
        seconds=seconds,
        stop=stop or Event(),
    )


def test_output_and_exit_status(tmp_path: Path) -> None:
    assert run("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)", tmp_path) == 7
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]
    assert run("import os; os.kill(os.getpid(), 9)", tmp_path) == -9


def test_children_of_a_child_that_ended_are_ended(tmp_path: Path) -> None:
    assert run(FAMILY + "print(subprocess.os.getpid())", tmp_path) == 0
    assert not group_of(int((tmp_path / "log").read_text()))


def test_time_up_and_stop_end_the_whole_group(tmp_path: Path) -> None:
    code = FAMILY + "print(subprocess.os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(processes.TimeUp):
        run(code, tmp_path, seconds=0.5)
    assert not group_of(int((tmp_path / "log").read_text()))
    stop = Event()
    Timer(0.5, stop.set).start()
    with pytest.raises(processes.Stopped):
        run(code, tmp_path, stop=stop)
    assert not group_of(int((tmp_path / "log").read_text()))


def test_a_group_that_will_not_end_is_killed(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); "
    code = deaf + "time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        processes.end_group(process, seconds=0.3)
        assert process.returncode == -signal.SIGKILL


def test_a_child_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    """`flows.child` runs a module here that waits for ever."""
    (tmp_path / "waiter.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    imports = "import subprocess; from flows import child; "
    code = imports + "subprocess.run(child.command('waiter'), start_new_session=True)"
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    with starter:
        assert starter.stdout is not None
        waiter = int(starter.stdout.readline())
        starter.kill()
        until(lambda: not runs(waiter), "the child to end", seconds=10)


def test_a_tool_runs_under_its_own_name() -> None:
    done = subprocess.run(child.command("dvc", "--version"), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("3.")


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, int]]:
    """(lock file, process) of a process that holds a stage's lock; the parameter is its environment."""
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, env={**os.environ, **request.param}) as process:
        until(lambda: lock.exists() and lock.read_text().strip() == str(process.pid), "the lock")
        yield lock, process.pid
        process.kill()


@pytest.mark.parametrize("holder", [{"DVC_ROOT": "/somewhere"}], indirect=True)
def test_what_dvc_started_and_left_behind_is_ended(holder: tuple[Path, int]) -> None:
    lock, process = holder
    assert processes.clear_the_way(lock, Event(), seconds=0.3) is None
    assert not runs(process)


@pytest.mark.parametrize("holder", [{}], indirect=True)
def test_what_a_person_started_is_left_alone(holder: tuple[Path, int]) -> None:
    lock, process = holder
    assert processes.clear_the_way(lock, Event(), seconds=0.3) == process
    assert runs(process)


def test_nobody_in_the_way(tmp_path: Path) -> None:
    assert processes.clear_the_way(tmp_path / "lock", Event()) is None
    (tmp_path / "lock").write_text("1\n")
    assert processes.clear_the_way(tmp_path / "lock", Event()) is None, "a file that nobody holds is no lock"


def group_of(leader: int) -> list[int]:
    """The processes of a group that still run."""
    return [each.pid for each in psutil.process_iter() if runs(each.pid) and _group(each.pid) == leader]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
