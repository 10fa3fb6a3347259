"""Stages forked from a process with the libraries in memory: for whoever starts one, nothing else differs."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from lm_stages import WARM
from toy import until

from tasks.stage import warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks of a process with torch are for Linux")
STAGE = """
import json, os, signal, sys, time
from pathlib import Path
from tasks.stage import DataError, Section, run_stage

class Params(Section):
    does: str

def body(params, context):
    import torch
    print(json.dumps({
        "pid": os.getpid(), "parent": Path(f"/proc/{os.getppid()}/cmdline").read_text(), "folder": os.getcwd(),
        "word": os.environ.get("WORD"), "threads": torch.get_num_threads(), "path": sys.path[0],
        "argv": len(sys.argv), "later": "sched" in sys.modules,
    }), flush=True)
    if params.does == "data":
        raise DataError("rows.jsonl:3: no output")
    if params.does == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if params.does == "wait":
        Path("begun").touch()
        with context.save_on_stop():
            while not context.stopping:
                time.sleep(0.01)
            time.sleep(float(os.environ.get("SECONDS_TO_WRITE", "0")))
            Path("saved").touch()
    return {"answer": VERSION}

if __name__ == "__main__":
    run_stage("toy", Params, body)
"""
HOST = """
import sys
import tasks.stage.warm as warm

warm.LIBRARIES, warm.LATER = ("torch",), ("not_here", "sched")
forked = warm.serve("\\0" + sys.argv[1], int(sys.argv[2]))
if forked is not None:
    warm.become(*forked)
"""
SHARED = "seed: 5\ncompute: {device: cpu, precision: auto, threads: 1, processes: 1, accelerate: null}\n"
SECONDS = 60


class Folder:
    """A folder with a stage in it, which the host of this test session starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write(1)
        (path / "dvc.yaml").write_text("stages: {toy: {cmd: python -m toy, params: [seed, compute, toy]}}")

    def write(self, version: int) -> None:
        (self.path / "toy.py").write_text(STAGE.replace("VERSION", str(version)))

    def start(self, does: str, **extra: str) -> subprocess.Popen[str]:
        (self.path / "params.yaml").write_text(f"{SHARED}toy: {{does: {does}}}\n")
        environment = {**os.environ, "LIFECYCLE_TRACKING": "off", **WARM, **extra}
        command = [sys.executable, "-W", "ignore", "-m", "toy"]
        return subprocess.Popen(
            command, cwd=self.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, does: str, code: int = 0, **extra: str) -> tuple[dict[str, object], str]:
        """What it found, and what it said."""
        process = self.start(does, **extra)
        out, said = process.communicate(timeout=SECONDS)
        assert process.returncode == code, said
        return json.loads(out), said

    def waiting(self) -> tuple[subprocess.Popen[str], psutil.Process]:
        """One that waits to be stopped, and the process that works for it."""
        process = self.start("wait")
        until((self.path / "begun").exists, "its beginning")
        return process, psutil.Process(int((self.path / ".work/toy/lock").read_text()))


@contextmanager
def runs() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_it_is_forked_and_finds_what_it_would_find_by_itself(folder: Folder) -> None:
    found, _ = folder.run("good", WORD="a word")
    alone, _ = folder.run("good", WORD="a word", **{warm.VARIABLE: ""})
    assert "tasks.stage.warm" in str(found.pop("parent"))
    assert "tasks.stage.warm" not in str(alone.pop("parent"))
    assert found.pop("pid") != alone.pop("pid")
    assert found == alone
    assert found["word"] == "a word"
    assert json.loads((folder.path / "metrics/toy.json").read_text()) == {"answer": 1}


def test_code_that_changed_since_is_the_code_that_runs(folder: Folder) -> None:
    folder.run("good")
    folder.write(2)
    folder.run("good")
    assert json.loads((folder.path / "metrics/toy.json").read_text()) == {"answer": 2}


def test_it_ends_as_its_child_ends(folder: Folder) -> None:
    _, said = folder.run("data", 2)
    assert "toy: rows.jsonl:3: no output" in said
    folder.run("kill", -signal.SIGKILL)


def test_a_request_to_stop_reaches_the_child(folder: Folder) -> None:
    process, child = folder.waiting()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert (folder.path / "saved").exists()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_killed_it_takes_the_child_along(folder: Folder) -> None:
    process, child = folder.waiting()
    process.kill()
    process.communicate()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "its end")
    assert not (folder.path / "saved").exists()


@pytest.mark.parametrize("asked", ["the starter is killed", "the whole group is asked to stop"])
def test_when_its_starter_is_gone_the_child_saves_and_ends(folder: Folder, asked: str) -> None:
    """A starter in the group is gone at once; that is no second request, which would cut the saving short."""
    (folder.path / "params.yaml").write_text(f"{SHARED}toy: {{does: wait}}\n")
    starter = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run([{sys.executable!r}, '-m', 'toy'])"],
        cwd=folder.path,
        env={**os.environ, "LIFECYCLE_TRACKING": "off", "SECONDS_TO_WRITE": "2", **WARM},
        start_new_session=True,
    )
    until((folder.path / "begun").exists, "its beginning")
    child = psutil.Process(int((folder.path / ".work/toy/lock").read_text()))
    if asked == "the starter is killed":
        starter.kill()
    else:
        os.killpg(starter.pid, signal.SIGTERM)
    starter.wait()
    until((folder.path / "saved").exists, "its saving")
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "its end")


def test_an_interpreter_that_is_set_otherwise_starts_by_itself(folder: Folder, tmp_path: Path) -> None:
    folder.run("good")
    found, _ = folder.run("good", PYTHONPATH=str(tmp_path))
    assert "tasks.stage.warm" not in str(found["parent"])


def test_the_host_imports_the_rest_when_the_first_stage_has_begun_and_ends_with_the_runner(
    folder: Folder,
) -> None:
    """A host as any other, but for the time that it takes to import more than torch."""
    with runs() as runner:
        address = f"lifecycle-{os.getuid()}-{runner.pid}"
        command = [sys.executable, "-W", "ignore", "-c", HOST, address, str(runner.pid)]
        host = subprocess.Popen(command, env={**os.environ, **WARM})
        until(lambda: listens(address), "the host")
        found, _ = folder.run("good", **{warm.VARIABLE: str(runner.pid)})
        second, _ = folder.run("good", **{warm.VARIABLE: str(runner.pid)})
        assert all("tasks.stage.warm" in str(each["parent"]) for each in (found, second))
        assert (found["later"], second["later"]) == (False, True)
        assert host.poll() is None
    assert host.wait(SECONDS) == 0
    again, _ = folder.run("good", **{warm.VARIABLE: str(runner.pid)})
    assert "tasks.stage.warm" not in str(again["parent"])


def listens(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        return asking.connect_ex(f"\0{address}") == 0
