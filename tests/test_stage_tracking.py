"""Runs reach MLflow exactly once, whatever happens to server, stage or sender, and carry no secrets."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.stage import recorder as recorder_module
from tasks.stage.files import write_text
from tasks.stage.lock import Lock, holder
from tasks.stage.recorder import Recorder
from tasks.stage.secrets import is_secret_name, redact
from tasks.stage.tracking import Stages, end_parent, link, start_parent, tag_committed, upload

TOY = """
import time
from pathlib import Path
from tasks.stage import Section, run_stage


class Params(Section):
    steps: int
    hub_token: str
    source: str


def toy(params, context):
    for step in range(params.steps):
        context.track.metrics({"loss": 1 / (step + 1)}, step=step)
        if step == 1:
            Path("ready").touch()
            while Path("hold").exists():
                time.sleep(0.01)
    context.track.table("samples", [{"prompt": "a", "answer": "b"}])
    context.track.figure("curve", Path("plot.png"))
    context.track.artifact(Path("dvc.yaml"))
    context.track.artifact(Path("reports"))
    context.track.dataset("train", Path("rows.jsonl"), "d" * 64, 3)
    return {"rouge": {"rouge1": 0.5}, "loss": 1 / params.steps, "why": "text"}


if __name__ == "__main__":
    run_stage("toy", Params, toy, torch=False)
"""
SECONDS = 120
TOKEN = "hf_" + "Secret42" * 4
PARAMS = f"""\
seed: 5
compute: {{device: auto, precision: auto, threads: null, processes: 1, accelerate: null}}
toy: {{steps: 3, hub_token: {TOKEN}, source: "https://me:hunter2@example.org/rows"}}
"""
OF_MLFLOW = pytest.mark.filterwarnings("ignore")  # what MLflow warns of when it is called in this process
GRAPH = "stages:\n  toy:\n    cmd: python -m toy\n    params: [seed, compute, toy]\n"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the toy stage, which is also the current one."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    files = {"toy.py": TOY, "params.yaml": PARAMS, "dvc.yaml": GRAPH, "plot.png": "", "reports/in/a.csv": "a"}
    for name, text in files.items():
        write_text(folder / name, text)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MY_API_TOKEN", "planted-in-the-environment")
    return folder


def start_stage(workspace: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "toy"],
        cwd=workspace,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_stage(workspace: Path, **environment: str) -> str:
    process = start_stage(workspace, **environment)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return errors


def until(condition: Any, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def last(workspace: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((workspace / ".work/toy/last.json").read_text(encoding="utf-8"))
    return record


def rows(store: str, query: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as connection:
        return connection.execute(query).fetchall()


def runs(store: str) -> list[tuple[Any, ...]]:
    return rows(store, "select name, status from runs order by start_time")


def tags(store: str, run_id: str) -> dict[str, str]:
    return dict(rows(store, f"select key, value from tags where run_uuid = '{run_id}'"))


def spooled(workspace: Path) -> list[str]:
    return [events.parent.name for events in (workspace / ".work/spool").glob("*/events.jsonl")]


def test_a_pipeline_and_its_stage_are_recorded_whole(workspace: Path, mlflow_store: str) -> None:
    """The stage's own sender has no server to speak to: the pipeline's sends for it."""
    parent = start_parent("lifecycle", {"prefect.flow_run_id": "flow-1"})
    until(lambda: holder(parent.folder / "sender"))
    errors = run_stage(
        workspace,
        LIFECYCLE_PARENT_RUN_ID=parent.id,
        LIFECYCLE_FLOW_RUN_ID="flow-1",
        LIFECYCLE_ATTEMPT="2",
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{closed_port()}",
    )
    assert errors == ""
    stage = last(workspace)
    metrics = json.loads((workspace / "metrics/toy.json").read_text(encoding="utf-8"))
    link(parent, "toy", stage["fingerprint"], metrics)
    tag_committed(parent, stage["recording"], {"models/toy": "abc.dir"}, "c0ffee")
    parent_id = end_parent(parent, "FINISHED")

    assert runs(mlflow_store) == [("lifecycle", "FINISHED"), ("toy", "FINISHED")]
    run_id = stage["mlflow_run_id"]
    assert parent_id is not None
    assert (
        tags(mlflow_store, run_id).items()
        >= {
            "mlflow.parentRunId": parent_id,
            "dvc.stage": "toy",
            "dvc.fingerprint": stage["fingerprint"],
            "dvc.out.models/toy": "abc.dir",
            "git.commit": "c0ffee",
            "prefect.flow_run_id": "flow-1",
            "attempt": "2",
        }.items()
    )
    assert tags(mlflow_store, parent_id)["stage.toy.run_id"] == run_id
    curve = rows(mlflow_store, f"select step, value from metrics where key = 'loss' and run_uuid = '{run_id}'")
    assert sorted(curve) == [(0, 1.0), (1, 0.5), (2, 1 / 3), (2, 1 / 3)]  # the last point and the final value
    final = dict(rows(mlflow_store, f"select key, value from latest_metrics where run_uuid = '{run_id}'"))
    assert final["rouge.rouge1"] == 0.5
    assert final["system/seconds"] > 0
    assert final["system/peak_memory_megabytes"] > 10
    of_parent = rows(mlflow_store, f"select key, value from latest_metrics where run_uuid = '{parent_id}'")
    assert ("toy.rouge.rouge1", 0.5) in of_parent
    params = dict(rows(mlflow_store, f"select key, value from params where run_uuid = '{run_id}'"))
    assert (params["steps"], params["seed"], params["compute.device"]) == ("3", "5", "auto")
    assert rows(mlflow_store, "select name, digest from datasets") == [("train", "d" * 36)]
    assert final["loss"] == 1 / 3  # the final value of a curve's name, not its first point
    (table,) = workspace.parent.glob("**/samples.json")
    assert json.loads(table.read_text(encoding="utf-8")) == {
        "columns": ["prompt", "answer"],
        "data": [["a", "b"]],
    }
    kept = {file.relative_to(table.parents[1]).as_posix() for file in table.parents[1].glob("**/*.*")}
    assert kept == {"tables/samples.json", "figures/curve.png", "dvc.yaml", "reports/in/a.csv"}
    assert spooled(workspace) == []

    everything = Path(mlflow_store.removeprefix("sqlite:///")).read_bytes()
    for secret in (TOKEN, "hunter2", "planted-in-the-environment"):
        assert secret.encode() not in everything
    assert params["source"] == "https://example.org/rows"


class Pipeline:
    """A pipeline's run whose sender is the process of the tests."""

    def __init__(self) -> None:
        self.run = Recorder("lifecycle", {})
        self.sender = Lock(self.run.folder / "sender")
        self.sender.acquire()
        self.stages = Stages(self.run.folder)

    def send_until_the_end_of(self, process: subprocess.Popen[str]) -> str:
        """What the stage said."""
        until(lambda: self.stages.step() or process.poll() is not None)
        return process.communicate(timeout=SECONDS)[1]


@OF_MLFLOW
def test_a_killed_stage_is_recorded_as_killed_by_its_pipeline(workspace: Path, mlflow_store: str) -> None:
    pipeline = Pipeline()
    (workspace / "hold").touch()
    process = start_stage(workspace, LIFECYCLE_PARENT_RUN_ID=pipeline.run.id)
    until((workspace / "ready").exists)
    until(lambda: list(workspace.glob(".work/spool/toy-*/left_to")))
    os.killpg(process.pid, signal.SIGKILL)  # its own sender, too
    assert pipeline.send_until_the_end_of(process) == ""
    until(lambda: pipeline.stages.step() or not list(workspace.glob(".work/spool/toy-*")))
    assert sorted(runs(mlflow_store)) == [("lifecycle", "RUNNING"), ("toy", "KILLED")]


@OF_MLFLOW
def test_what_a_pipeline_cannot_send_is_told_by_the_stage_and_arrives_later_once(
    workspace: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline()
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@127.0.0.1:{closed_port()}")
        errors = pipeline.send_until_the_end_of(start_stage(workspace, LIFECYCLE_PARENT_RUN_ID=pipeline.run.id))
    assert len(errors.splitlines()) == 1
    assert "Connection refused" in errors and "`lifecycle upload` sends it later" in errors
    assert "hunter2" not in errors
    assert (last(workspace)["exit_code"], last(workspace)["mlflow_run_id"]) == (0, None)
    assert upload().sent == [last(workspace)["recording"]]
    assert sorted(runs(mlflow_store)) == [("lifecycle", "RUNNING"), ("toy", "FINISHED")]


def test_a_stage_whose_pipeline_no_longer_sends_sends_by_itself(workspace: Path, mlflow_store: str) -> None:
    pipeline = Pipeline()
    process = start_stage(workspace, LIFECYCLE_PARENT_RUN_ID=pipeline.run.id)
    until(lambda: list(workspace.glob(".work/spool/toy-*/left_to")))
    assert rows(mlflow_store, "select name from runs") == []
    pipeline.sender.release()
    assert process.communicate(timeout=SECONDS)[1] == ""
    assert sorted(runs(mlflow_store)) == [("lifecycle", "RUNNING"), ("toy", "FINISHED")]
    assert spooled(workspace) == [pipeline.run.id]


def test_with_the_server_down_the_stage_is_the_same_and_the_run_arrives_later_once(
    workspace: Path, mlflow_store: str
) -> None:
    errors = run_stage(workspace, MLFLOW_TRACKING_URI=f"http://me:hunter2@127.0.0.1:{closed_port()}")
    assert len(errors.splitlines()) == 1
    assert "Connection refused" in errors
    assert "`lifecycle upload` sends it later" in errors
    assert "hunter2" not in errors
    written = (workspace / "metrics/toy.json").read_bytes()
    assert last(workspace)["exit_code"] == 0
    assert last(workspace)["mlflow_run_id"] is None
    assert runs(mlflow_store) == []

    assert upload().sent == [last(workspace)["recording"]]
    assert runs(mlflow_store) == [("toy", "FINISHED")]
    curve = rows(mlflow_store, "select distinct step, value from metrics where key = 'loss'")
    assert sorted(curve) == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert upload().sent == []
    assert len(runs(mlflow_store)) == 1

    run_stage(workspace, LIFECYCLE_TRACKING="off")
    assert (workspace / "metrics/toy.json").read_bytes() == written


def test_a_killed_stage_is_recorded_as_killed_by_its_sender(workspace: Path, mlflow_store: str) -> None:
    (workspace / "hold").touch()
    process = start_stage(workspace)
    until((workspace / "ready").exists)
    process.kill()
    process.communicate(timeout=SECONDS)  # returns when the sender, which holds the same pipe, is gone
    assert runs(mlflow_store) == [("toy", "KILLED")]
    assert spooled(workspace) == []


@OF_MLFLOW
def test_a_stop_request_is_recorded_as_killed(workspace: Path, mlflow_store: str) -> None:
    pipeline = Pipeline()
    (workspace / "hold").touch()
    process = start_stage(workspace, LIFECYCLE_PARENT_RUN_ID=pipeline.run.id)
    until((workspace / "ready").exists)
    os.killpg(process.pid, signal.SIGTERM)  # the sender hears it too, and stays
    pipeline.send_until_the_end_of(process)
    assert process.returncode == 143
    assert sorted(runs(mlflow_store)) == [("lifecycle", "RUNNING"), ("toy", "KILLED")]
    assert last(workspace)["mlflow_run_id"] is not None


def test_a_run_whose_sender_was_killed_too_is_ended_at_the_next_start(
    workspace: Path, mlflow_store: str
) -> None:
    (workspace / "hold").touch()
    process = start_stage(workspace)
    until((workspace / "ready").exists)
    until(lambda: runs(mlflow_store) == [("toy", "RUNNING")])
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert runs(mlflow_store) == [("toy", "RUNNING")]
    (workspace / "hold").unlink()
    run_stage(workspace)
    assert runs(mlflow_store) == [("toy", "KILLED"), ("toy", "FINISHED")]
    assert spooled(workspace) == []


def test_a_run_that_is_being_written_is_left_alone(workspace: Path, mlflow_store: str) -> None:
    running = Recorder("toy", {}, None)
    assert holder(running.folder / "writer") == os.getpid()
    assert upload().sent == []
    assert spooled(workspace) == [running.id]
    running.end("FINISHED")
    assert upload().sent == [running.id]


def test_parents_that_were_spooled_find_their_children(workspace: Path, mlflow_store: str) -> None:
    parent = Recorder("lifecycle", {})
    child = Recorder("toy", {"dvc.stage": "toy", "dvc.fingerprint": "f00"}, parent.id)
    child.end("FINISHED")
    link(parent, "toy", "f00", {"accuracy": 1})
    tag_committed(parent, child.id, {"out": "1"}, None)
    parent.end("FINISHED")
    assert set(upload().sent) == {parent.id, child.id}
    ids = {name: run for run, name in rows(mlflow_store, "select run_uuid, name from runs")}
    assert tags(mlflow_store, ids["toy"])["mlflow.parentRunId"] == ids["lifecycle"]
    assert tags(mlflow_store, ids["toy"])["dvc.out.out"] == "1"
    assert tags(mlflow_store, ids["lifecycle"])["stage.toy.run_id"] == ids["toy"]


def test_outputs_are_tagged_on_a_run_that_is_not_sent_yet(workspace: Path, mlflow_store: str) -> None:
    """The server came back after the stage had given up on it, and before the pipeline was over."""
    child, parent = Recorder("toy", {}), Recorder("lifecycle", {})
    tag_committed(parent, child.id, {"out": "1"}, None)
    parent.end("FINISHED")
    assert upload().sent == [parent.id]  # the child is still being written
    child.end("FINISHED")
    assert upload().sent == [child.id]
    assert sorted(runs(mlflow_store)) == [("lifecycle", "FINISHED"), ("toy", "FINISHED")]
    (run_id,) = rows(mlflow_store, "select run_uuid from runs where name = 'toy'")[0]
    assert tags(mlflow_store, run_id)["dvc.out.out"] == "1"


def test_a_cached_stage_is_linked_to_the_run_of_an_earlier_pipeline(workspace: Path, mlflow_store: str) -> None:
    for status in ("FINISHED", "FAILED"):  # only a run that finished made the outputs
        made = Recorder("toy", {"dvc.stage": "toy", "dvc.fingerprint": "f00"})
        made.end(status)  # type: ignore[arg-type]
    Recorder("other", {"dvc.stage": "other", "dvc.fingerprint": "f00"}).end("FINISHED")
    upload()
    parent = Recorder("lifecycle", {})
    link(parent, "toy", "f00", {})
    link(parent, "gone", "f00", {})
    parent.end("FINISHED")
    assert upload().problem is None
    (linked,) = rows(mlflow_store, "select key, value from tags where key like 'stage.%'")
    (first,) = rows(mlflow_store, "select run_uuid from runs where name = 'toy' and status = 'FINISHED'")
    assert linked == ("stage.toy.run_id", first[0])


def _full(_descriptor: int, _content: bytes) -> int:
    raise OSError(28, os.strerror(28))


def test_a_full_disk_stops_the_recording_and_nothing_else(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Recorder("toy", {})
    monkeypatch.setattr(recorder_module.os, "write", _full)
    run.metrics({"loss": 1.0})
    run.metrics({"loss": 1.0})
    run.artifact(workspace / "toy.py")
    assert run.end("FINISHED") is None
    assert capsys.readouterr().err.splitlines() == [
        "warning: nothing more is recorded about this run: [Errno 28] No space left on device"
    ]


def test_a_full_disk_does_not_keep_the_stage_waiting_for_its_sender(
    workspace: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Recorder("toy", {})
    run.start_sending()
    with monkeypatch.context() as patch:
        patch.setattr(recorder_module.os, "write", _full)
        assert run.end("FINISHED") is None
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert upload().sent == [run.id]
    assert runs(mlflow_store) == [("toy", "KILLED")], "how it ended could not be written"


def test_a_store_whose_disk_is_full_takes_the_run_later_once(
    workspace: Path, mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        store = f"sqlite:///{shutil.copy(mlflow_template, disk / 'mlflow.db')}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        errors = run_stage(workspace)
        assert errors.count("\n") == 1
        assert "disk is full" in errors or "No space left" in errors
        assert "`lifecycle upload` sends it later" in errors
        metrics = (workspace / "metrics/toy.json").read_bytes()
        filler.unlink()
        run_stage(workspace, LIFECYCLE_TRACKING="off")
        assert (workspace / "metrics/toy.json").read_bytes() == metrics
        (recording,) = spooled(workspace)
        assert upload().sent == [recording]
        assert runs(store) == [("toy", "FINISHED")]
        assert rows(store, "select count(*) from metrics where key = 'loss'") == [(4,)]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_line_cut_short_by_a_kill_is_passed_over(workspace: Path, mlflow_store: str) -> None:
    run = Recorder("toy", {})
    run.metrics({"loss": 1.0})
    run.end("FINISHED")
    events = run.folder / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join(lines[:2]) + b'{"kind": "metr')
    assert upload().sent == [run.id]
    assert runs(mlflow_store) == [("toy", "KILLED")]


def test_a_sender_killed_after_the_last_request_changes_nothing(
    workspace: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Recorder("toy", {})
    run.metrics({"loss": 1.0})
    run.end("FINISHED")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: pytest.fail("killed here"))
        with pytest.raises(pytest.fail.Exception):
            upload()
    assert runs(mlflow_store) == [("toy", "FINISHED")]
    assert upload().sent == [run.id]
    assert runs(mlflow_store) == [("toy", "FINISHED")]


class DyingServer(ThreadingHTTPServer):
    """Speaks as much of MLflow's protocol as sending needs; dies at a chosen request, its deed done or not."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests_left = 10**6
        self.does_the_last = False
        self.runs: dict[str, dict[str, Any]] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: DyingServer

    def answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.server.requests_left -= 1
        if self.server.requests_left >= 0 or (self.server.requests_left == -1 and self.server.does_the_last):
            reply = json.dumps(self.act(self.path.partition("?")[0].rpartition("mlflow/")[2], body)).encode()
        if self.server.requests_left < 0:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = answer  # noqa: N815

    def act(self, what: str, body: dict[str, Any]) -> dict[str, Any]:
        runs = self.server.runs
        match what:
            case "experiments/get-by-name":
                return {"experiment": {"experiment_id": "1", "name": "lifecycle", "lifecycle_stage": "active"}}
            case "runs/search":
                found = [run for run in runs.values() if run["recording"] in body["filter"]]
                return {"runs": [described(run) for run in found]}
            case "runs/create":
                recording = next(tag["value"] for tag in body["tags"] if tag["key"] == "lifecycle.recording")
                run = {"id": f"run{len(runs)}", "recording": recording, "points": set(), "status": "RUNNING"}
                runs[run["id"]] = run
                return {"run": described(run)}
            case "runs/log-batch":
                points = {(point["key"], point["step"], point["value"]) for point in body.get("metrics", [])}
                runs[body["run_id"]]["points"] |= points
            case "runs/update":
                runs[body["run_id"]]["status"] = body["status"]
                return {"run_info": {}}
            case "runs/get":
                return {"run": described(runs["run0"])}
        return {}

    def log_message(self, *_arguments: object) -> None:
        pass


def described(run: dict[str, Any]) -> dict[str, Any]:
    info = {"run_id": run["id"], "experiment_id": "1", "status": run["status"], "artifact_uri": "kept"}
    return {"info": info, "data": {}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DyingServer]:
    with DyingServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        yield server
        server.shutdown()
        thread.join()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_run_begun_in_a_store_that_is_gone_is_sent_whole_to_the_next(
    workspace: Path, mlflow_store: str, server: DyingServer
) -> None:
    run = Recorder("toy", {})
    run.metrics({"loss": 1.0}, step=1)
    run.params({"rate": 1})
    run.end("FINISHED")
    server.requests_left = 5  # the metrics are in
    assert upload().kept == [run.id]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
        assert upload().sent == [run.id]
    assert runs(mlflow_store) == [("toy", "FINISHED")]
    assert rows(mlflow_store, "select value from metrics where key = 'loss'") == [(1.0,)]


@pytest.mark.parametrize("does_the_last", [False, True])
def test_wherever_the_server_dies_the_run_is_there_once(
    workspace: Path, server: DyingServer, does_the_last: bool
) -> None:
    """Every request in turn is the one the server dies at, once before and once after it did what was asked."""
    server.does_the_last = does_the_last
    for survives in range(20):
        server.runs.clear()
        run = Recorder("toy", {})
        run.params({"rate": 0.1})
        for step in range(3):
            run.metrics({"loss": float(step)}, step=step)
        run.end("FINISHED")
        server.requests_left = survives
        first = upload()
        server.requests_left = 10**6
        if first.problem is not None:
            assert first.kept == [run.id]
            assert upload().sent == [run.id]
        (sent,) = server.runs.values()
        assert sent["status"] == "FINISHED"
        assert {(step, value) for name, step, value in sent["points"] if name == "loss"} == {
            (0, 0),
            (1, 1),
            (2, 2),
        }
        if first.problem is None:
            assert survives > 5  # experiment, search, create, params, metrics, end: all of them were tried
            return
    pytest.fail("the server never lived long enough")


def test_a_server_that_dies_while_the_stage_runs_costs_nothing(workspace: Path, server: DyingServer) -> None:
    (workspace / "hold").touch()
    process = start_stage(workspace)
    until((workspace / "ready").exists)
    until(lambda: server.runs)
    server.requests_left = 0
    (workspace / "hold").unlink()
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert len(errors.splitlines()) == 1
    assert "lifecycle upload" in errors
    server.requests_left = 10**6
    assert upload().sent == [last(workspace)["recording"]]
    (run,) = server.runs.values()
    assert run["status"] == "FINISHED"
    assert len([name for name, _, _ in run["points"] if name == "loss"]) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/x", "https://host/x"),
        ("postgresql://me:p%40w@host/db and s3://key:secret@b", "postgresql://host/db and s3://b"),
        (f"token {TOKEN}.", "token ***."),
        ("ghp_" + "a" * 36, "***"),
        ("planted-in-the-environment!", "***!"),
        ("mail me@example.org, learning_rate 0.1", "mail me@example.org, learning_rate 0.1"),
    ],
)
def test_secrets_are_blotted_out_of_text(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "planted-in-the-environment")
    assert redact(text) == expected


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("toy.hub_token", True),
        ("token", True),
        ("db_password", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("pad_token", False),
        ("max_new_tokens", False),
        ("tokens_per_batch", False),
        ("key", False),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret
