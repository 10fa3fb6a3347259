"""A toy stage as a real process: exit codes, lock, stop requests, an owner that vanishes, the exit record."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.stage.lock import holder

TOY = """
import os, signal, sys, time
from pathlib import Path
from typing import Literal
from tasks.stage import Context, DataError, GateRefused, Section, TryAgain, run_stage
from tasks.stage.checkpoints import newest_verified, save


class Params(Section):
    does: str


def wait(context):
    Path("ready").touch()
    time.sleep(60)


def save_when_stopped(context):
    step = 0
    with context.save_on_stop(), context.progress(None, "counting") as bar:
        Path("ready").touch()
        while not context.stopping:
            step += 1
            bar.advance(step=step)
            time.sleep(0.01)
        with save(context.work, step) as folder:
            time.sleep(float(os.environ.get("SECONDS_TO_WRITE", "0")))
            (folder / "weights").write_text(str(step))


def toy(params, context):
    match params.does:
        case "data": raise DataError("rows.jsonl:3: no output")
        case "gate": raise GateRefused("accuracy .5 is below .6")
        case "busy": raise TryAgain("the server is away")
        case "full":
            with open("/dev/full", "w") as file: file.write("x" * 10_000)
        case "full, says a library": raise RuntimeError("write failed: No space left on device (os error 28)")
        case "bug": return {"x": 1 / 0}
        case "nan": return {"loss": float("nan")}
        case "wait": wait(context)
        case "save": save_when_stopped(context)
        case "deaf":
            with context.save_on_stop(): wait(context)
    return {"seed": context.seed, "nested": {"b": 2.5, "a": "text"}}


if __name__ == "__main__":
    run_stage("toy", Params, toy, torch=False)
"""
PARAMS = """
seed: 5
compute: {device: auto, precision: auto, threads: null, processes: 1, accelerate: null}
toy: {does: DOES}
"""
GRAPH = "stages:\n  toy:\n    cmd: COMMAND\n    deps: [toy.py]\n    params: [seed, compute, toy]\n"


class Workspace:
    """A folder with the toy stage in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"LIFECYCLE_TRACKING": "off"}
        (folder / "toy.py").write_text(TOY, encoding="utf-8")
        self.write_graph("python -m toy")

    def write_graph(self, command: str) -> None:
        (self.folder / "dvc.yaml").write_text(GRAPH.replace("COMMAND", command), encoding="utf-8")

    def start_dvc(self, does: str) -> subprocess.Popen[str]:
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        initialise = ["dvc", "init", "--no-scm", "-q"]
        subprocess.run(initialise, cwd=self.folder, env=self.environment, check=True)
        return self.start(does, "dvc", "repro", "-q")

    def start(self, does: str, *command: str) -> subprocess.Popen[str]:
        (self.folder / "params.yaml").write_text(PARAMS.replace("DOES", does), encoding="utf-8")
        return subprocess.Popen(
            command or (sys.executable, "-m", "toy"),
            cwd=self.folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, does: str) -> tuple[int, str]:
        process = self.start(does)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def last(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / ".work/toy/last.json").read_text(encoding="utf-8"))
        return record

    def progress(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(
            (self.folder / ".work/toy/progress.json").read_text(encoding="utf-8")
        )
        return state

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob(".work/toy/*/checkpoint-*"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for `condition`; fail when it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_good_run_writes_sorted_metrics_and_says_so(workspace: Workspace) -> None:
    assert workspace.run("finish") == (0, "")
    written = (workspace.folder / "metrics/toy.json").read_text(encoding="utf-8")
    assert written == '{\n  "nested": {\n    "a": "text",\n    "b": 2.5\n  },\n  "seed": 5\n}\n'
    last = workspace.last()
    assert (last["exit_code"], last["message"], last["attempt"], last["mlflow_run_id"]) == (0, "", 1, None)
    assert last["started"] <= last["ended"]


@pytest.mark.parametrize(
    ("does", "code", "line"),
    [
        ("data", 2, "toy: rows.jsonl:3: no output\n"),
        ("gate", 3, "toy: accuracy .5 is below .6\n"),
        ("busy", 75, "toy: the server is away\n"),
        ("full", 75, "toy: the disk is full ([Errno 28] No space left on device): make room and run again\n"),
        (
            "full, says a library",
            75,
            "toy: the disk is full (write failed: No space left on device (os error 28)): "
            "make room and run again\n",
        ),
        ("[1]", 2, "toy: params.yaml: toy.does: found [1], expected a valid string\n"),
    ],
)
def test_what_is_no_bug_of_ours_is_one_line_and_its_exit_code(
    workspace: Workspace, does: str, code: int, line: str
) -> None:
    does = does if does.startswith("[") else f'"{does}"'
    assert workspace.run(does) == (code, line)
    assert workspace.last()["exit_code"] == code
    assert workspace.last()["message"] == line.removeprefix("toy: ").rstrip()
    assert not (workspace.folder / "metrics").exists()


@pytest.mark.parametrize(("does", "error"), [("bug", "ZeroDivisionError"), ("nan", "ValueError")])
def test_a_bug_of_ours_keeps_its_traceback(workspace: Workspace, does: str, error: str) -> None:
    code, errors = workspace.run(does)
    assert code == 1
    assert "Traceback" in errors
    assert error in errors
    assert not list(workspace.folder.glob("metrics/*"))


def test_a_second_start_names_the_first_and_leaves_it_alone(workspace: Workspace) -> None:
    first = workspace.start("wait")
    until((workspace.folder / "ready").exists)
    assert holder(workspace.folder / ".work/toy/lock") == first.pid
    assert workspace.run("wait") == (75, f"toy: toy is already running here as process {first.pid}\n")
    first.kill()
    first.communicate()
    assert holder(workspace.folder / ".work/toy/lock") is None  # a killed owner does not keep it
    assert workspace.run("finish")[0] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_request_ends_the_body_at_once(workspace: Workspace, number: signal.Signals, code: int) -> None:
    process = workspace.start("wait")
    until((workspace.folder / "ready").exists)
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (code, f"toy: stopped by signal {int(number)}\n")
    assert workspace.last()["exit_code"] == code


def test_a_body_that_saves_is_given_the_time(workspace: Workspace) -> None:
    process = workspace.start("save")
    until((workspace.folder / "ready").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143
    assert len(workspace.checkpoints()) == 1
    assert workspace.progress()["done"] == int(workspace.checkpoints()[0].name.removeprefix("checkpoint-"))


def test_a_body_that_does_not_react_is_ended_by_a_second_request(workspace: Workspace) -> None:
    process = workspace.start("deaf")
    until((workspace.folder / "ready").exists)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143


@pytest.mark.parametrize(
    "command", ["python -m toy", "python -m toy && true"]
)  # the second keeps a shell between
def test_a_stage_whose_dvc_is_killed_saves_and_ends(workspace: Workspace, command: str) -> None:
    workspace.write_graph(command)
    dvc = workspace.start_dvc("save")
    until((workspace.folder / "ready").exists)
    lock = workspace.folder / ".work/toy/lock"
    assert holder(lock) not in (None, dvc.pid)
    dvc.kill()
    dvc.communicate(timeout=20)  # returns when the stage, which holds the same pipe, is gone
    assert holder(lock) is None
    assert workspace.last()["exit_code"] == 143
    assert len(workspace.checkpoints()) == 1


def test_when_the_whole_group_is_asked_to_stop_the_save_is_not_cut_short(workspace: Workspace) -> None:
    """DVC, being in the group, is gone at once; the stage must not take that for a second request."""
    workspace.environment["SECONDS_TO_WRITE"] = "2"
    dvc = workspace.start_dvc("save")
    until((workspace.folder / "ready").exists)
    os.killpg(dvc.pid, signal.SIGTERM)
    dvc.communicate(timeout=20)
    assert workspace.last()["exit_code"] == 143
    assert len(workspace.checkpoints()) == 1


def test_a_stage_under_a_shell_that_somebody_types_into_may_outlive_it(workspace: Workspace) -> None:
    pipe = subprocess.PIPE
    shell = subprocess.Popen(
        ["sh"], cwd=workspace.folder, env=workspace.environment, stdin=pipe, stderr=pipe, text=True
    )
    (workspace.folder / "params.yaml").write_text(PARAMS.replace("DOES", "save"), encoding="utf-8")
    assert shell.stdin is not None
    shell.stdin.write(f"{sys.executable} -m toy\n")
    shell.stdin.flush()
    until((workspace.folder / "ready").exists)
    stage = holder(workspace.folder / ".work/toy/lock")
    assert stage is not None
    shell.kill()
    shell.wait()
    seen = workspace.progress()["seconds"]
    until(lambda: workspace.progress()["seconds"] > seen + 2)  # it would have been noticed within half a second
    os.kill(stage, signal.SIGTERM)
    shell.communicate(timeout=20)
    assert workspace.last()["exit_code"] == 143


def test_checkpoints_of_other_params_go_when_the_stage_is_done(workspace: Workspace) -> None:
    process = workspace.start("save")
    until((workspace.folder / "ready").exists)
    process.terminate()
    process.communicate(timeout=10)
    assert workspace.run("finish")[0] == 0
    kept = [path.name for path in (workspace.folder / ".work/toy").iterdir() if path.is_dir()]
    assert kept == [workspace.last()["fingerprint"]]


FORKED = """
import os, pathlib, time
from tasks.stage.lock import Lock
assert Lock(pathlib.Path("lock")).acquire()
if os.fork() == 0:
    pathlib.Path("child").write_text(str(os.getpid()))
    time.sleep(60)
os.kill(os.getpid(), 9)
"""


def test_a_forked_child_that_lives_on_does_not_keep_the_lock(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKED], cwd=tmp_path)
    until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text(encoding="ascii"))
    assert holder(tmp_path / "lock") is None
    os.kill(int((tmp_path / "child").read_text(encoding="ascii")), signal.SIGKILL)


DETERMINED = """
import random, numpy, torch
from tasks.stage import Compute
from tasks.stage.determinism import prepare_torch
drawn = []
for _ in range(2):
    prepare_torch(7, Compute(device="cpu", precision="fp32", threads=1, processes=1, accelerate=None))
    drawn.append((random.random(), numpy.random.rand(), torch.rand(3).tolist()))
print(drawn[0] == drawn[1], torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
"""


def test_torch_draws_the_same_again() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", DETERMINED]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["True", "1", "True"]


def test_importing_the_package_is_light() -> None:
    script = (
        "import sys, tasks.stage; print(*{'torch', 'mlflow', 'numpy', 'pandas', 'rich'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""
