"""Child processes that leave nothing behind: each in a session of its own, the whole group ended after it."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

import psutil

from tasks.stage.lock import holder

SECONDS_TO_END = 25.0  # a stage may take 20 s to save its checkpoint
SECONDS_BETWEEN_LOOKS = 0.1
_running: set[int] = set()  # the groups that `run` has started and not yet ended


class Stopped(Exception):  # noqa: N818 - an answer to a request, not an error
    """The run was asked to stop."""


class TimeUp(Exception):  # noqa: N818
    """The child took longer than it may."""


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    seconds: float | None,
    stop: Event,
    seconds_to_end: float = SECONDS_TO_END,
) -> int:
    """Run `command` in `folder`, its output in the file `log`, and return its exit status (-N: signal N).

    Whatever it started is gone when this returns or raises: what does not end when it is asked to is killed
    after `seconds_to_end`. Raises TimeUp after `seconds`, and Stopped once
    `stop` is set.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _running.add(process.pid)
    try:
        return _wait(process, seconds, stop)
    finally:
        end_group(process, seconds_to_end)
        _running.discard(process.pid)


def kill_all() -> None:
    """Kill every group that `run` has started and not yet ended, at once."""
    for group in list(_running):
        _signal_group(group, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], seconds: float | None, stop: Event) -> int:
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            return process.wait(SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            if stop.is_set():
                raise Stopped from None
            if end is not None and time.monotonic() > end:
                raise TimeUp from None


def end_group(leader: subprocess.Popen[bytes], seconds: float = SECONDS_TO_END) -> None:
    """End the process group of `leader`: ask first, and kill what is left after `seconds`."""
    end = time.monotonic() + seconds
    _signal_group(leader.pid, signal.SIGTERM)
    while _group_lives(leader) and time.monotonic() < end:
        time.sleep(SECONDS_BETWEEN_LOOKS / 2)
    _signal_group(leader.pid, signal.SIGKILL)
    leader.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass  # all of it has ended
    except PermissionError:
        pass  # macOS says so of a group in which only dead processes are left


def _group_lives(leader: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the group still runs; those that ended and wait for their parent do not count."""
    leader.poll()
    try:
        os.killpg(leader.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    for process in psutil.process_iter(["status"]):
        try:
            in_group = os.getpgid(process.pid) == leader.pid
        except ProcessLookupError:
            continue
        if in_group and process.info["status"] != psutil.STATUS_ZOMBIE:
            return True
    return False


def clear_the_way(lock: Path, stop: Event, seconds: float = SECONDS_TO_END) -> int | None:
    """See to it that nobody works on a stage's outputs; `lock` is the file that a running stage holds.

    An orphan (DVC started it and is gone) ends itself once it has saved its checkpoint; after `seconds` it is
    killed. Returns the id of the process that must be waited for, if somebody else runs the stage, or None.
    """
    owner = holder(lock)
    if owner is None:
        return None
    try:
        process = psutil.Process(owner)
        if not _orphan(process):
            return owner
        end = time.monotonic() + seconds
        while time.monotonic() < end and not stop.is_set():
            if holder(lock) != owner:
                return None
            time.sleep(SECONDS_BETWEEN_LOOKS)
        process.kill()
        process.wait(timeout=seconds)
    except psutil.NoSuchProcess:
        return None  # it ended meanwhile
    return None


def _orphan(process: psutil.Process) -> bool:
    """Whether DVC started the process and no DVC is above it any more."""
    try:
        if "DVC_ROOT" not in process.environ():
            return False
        return not any("dvc" in _program(parent.cmdline()) for parent in process.parents())
    except psutil.AccessDenied:
        return False


def _program(command: Sequence[str]) -> set[str]:
    """The names in the first words of a command line: `python -m flows.child 7 dvc repro` and `dvc repro`."""
    return {Path(word).name for word in command[:5]}
