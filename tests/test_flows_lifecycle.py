"""The flow against real DVC and Prefect processes, on toy repositories."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from label_toys import toy_that_waits
from prefect_server import PrefectServer, ask
from toy import CHILD_SECONDS, Toy, build, read_until, until
from webhook import Webhook

from flows import links, pipeline, rankings, report, run, server, verify
from tasks.stage.recorder import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC's pygtrie
DIAMOND = {"d": ["b", "c"], "a": [], "b": ["a"], "c": ["a"]}


@pytest.fixture(autouse=True)
def environment(prefect_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(prefect_home))


@pytest.fixture(scope="module")
def unstarted(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Two stages, of which the first waits until it is let go."""
    toy = build(tmp_path_factory.mktemp("unstarted") / "toy", {"a": [], "b": ["a"]}, meta={"a": {"retries": 0}})
    toy.set("a", outcome="wait")
    return toy


@pytest.fixture(scope="module")
def expected_lock(unstarted: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """dvc.lock of a run that nobody disturbs."""
    toy = unstarted.copy(tmp_path_factory.mktemp("expected") / "toy")
    toy.go()
    toy.dvc("repro")
    return toy.lock()


def test_flow_and_dvc_repro_leave_the_same_lock_and_the_second_run_starts_nothing(tmp_path: Path) -> None:
    """Without a server: a temporary one records the run, and the run with nothing to do needs none."""
    serial = build(tmp_path / "serial", DIAMOND, light=True)
    parallel = serial.copy(tmp_path / "parallel")
    serial.dvc("repro")

    parallel.lifecycle("run", afresh=True)
    assert sorted(parallel.starts()) == ["a", "b", "c", "d"]
    lock = (parallel.root / "dvc.lock").read_bytes()
    assert lock == (serial.root / "dvc.lock").read_bytes()

    parallel.forget_starts()
    again = parallel.lifecycle("run")
    assert parallel.starts() == []
    assert "nothing to do" in again.stderr
    assert (parallel.root / "dvc.lock").read_bytes() == lock

    assert "up to date" in parallel.dvc("status").stdout


def test_random_graphs_end_as_dvc_repro_ends_them(tmp_path: Path, served: str) -> None:
    """Two graphs that have nothing in common, in one dvc.yaml."""
    graph: dict[str, list[str]] = {}
    for seed in (1, 2):
        draw = random.Random(seed)
        names = [f"s{seed}{number}" for number in range(3)]
        for i, name in enumerate(names):
            graph[name] = sorted(draw.sample(names[:i], k=min(i, draw.randrange(3))))
    shuffled = dict(sorted(graph.items(), key=lambda _: draw.random()))
    serial = build(tmp_path / "serial", shuffled, light=True)
    parallel = serial.copy(tmp_path / "parallel")
    serial.dvc("repro")
    parallel.lifecycle("run", "--jobs", "4")
    assert (parallel.root / "dvc.lock").read_bytes() == (serial.root / "dvc.lock").read_bytes()
    assert sorted(parallel.starts()) == sorted(graph)


def test_stages_that_ask_for_a_gpu_run_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = pipeline.Meta(**{**pipeline.USUAL_META, "gpu": True})
    stages = {name: pipeline.Stage(name, name, (), (), meta) for name in "ab"}
    toy = run.Run(tmp_path, stages, {"a": (), "b": ()}, frozenset("ab"), jobs=2)
    running, most = set(), []

    def reproduce(name: str, _: object) -> str:
        running.add(name)
        most.append(len(running))
        Event().wait(0.1)
        running.discard(name)
        return "done"

    monkeypatch.setattr(toy, "_reproduce", reproduce)
    with ThreadPoolExecutor(2) as threads:
        assert [result.state for result in threads.map(toy.settle, "ab")] == ["done", "done"]
    assert most == [1, 1]


@pytest.mark.parametrize(("state", "shown"), [("done", 1), ("cached", 1), ("stopped", 0), (None, 0)])
def test_scores_are_those_of_this_run(state: Any, shown: int, tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "evaluate.json").write_text(json.dumps({"examples": 7, "base": {"rougeL": 0.5}}))
    meta = pipeline.Meta(**pipeline.USUAL_META)
    names = ["a"] if state is None else ["a", "evaluate"]
    stages = {name: pipeline.Stage(name, name, (), (), meta) for name in names}
    toy = run.Run(tmp_path, stages, dict.fromkeys(names, ()), frozenset(), jobs=1)
    if state is not None:
        toy.results["evaluate"].state = state
    assert len(report.variants_of(toy)) == shown
    results = [row["result"] for row in report.as_rows(toy)]
    assert results == ["", "examples=7"] if shown else not any(results)


def test_a_run_links_to_its_mlflow_runs_and_its_mlflow_run_links_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    meta = pipeline.Meta(**pipeline.USUAL_META)
    toy = run.Run(tmp_path, {"a": pipeline.Stage("a", "a", (), (), meta)}, {"a": ()}, frozenset(), jobs=1)
    toy.parent, toy.flow_run_url = Recorder("toy", {}), "http://127.0.0.1:4200/flow-runs/flow-run/7"
    (toy.parent.folder / "run_id").write_text("beef")
    (tmp_path / ".work" / "a").mkdir()
    (tmp_path / ".work" / "a" / "last.json").write_text('{"mlflow_run_id": "cafe"}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example/")
    assert report.as_markdown(toy).endswith(
        "MLflow: [this run](https://mlflow.example/#/runs/beef) · [a](https://mlflow.example/#/runs/cafe)\n"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert links.mlflow_run("cafe") == "http://127.0.0.1:5000/#/runs/cafe"

    page = tmp_path / "lifecycle.html"
    page.write_text("<html></html>")
    toy.close(page)
    events = [json.loads(line) for line in (toy.parent.folder / "events.jsonl").read_text().splitlines()]
    tags = next(event["values"] for event in events if "mlflow.note.content" in event.get("values", {}))
    assert tags["mlflow.note.content"] == (
        f"[Prefect run]({toy.flow_run_url}) · report: lifecycle.html, among the artifacts"
    )
    assert [event["file"] for event in events if event["kind"] == "artifact"] == ["lifecycle.html"]


def test_a_preset_and_force_leave_the_same_lock_however_often(tmp_path: Path, served: str) -> None:
    toy = build(tmp_path / "toy", {"a": [], "b": ["a"]}, light=True)
    preset = toy.root / "presets" / "other.yaml"
    preset.parent.mkdir()
    preset.write_text("a: {text: another}\n")
    locks = []
    for arguments in (["--preset", "other"], ["--preset", "other"], ["--force"]):
        toy.lifecycle("run", *arguments)
        locks.append((toy.root / "dvc.lock").read_bytes())
    assert toy.starts() == ["a", "b"] * 2, "the second time the preset changes nothing"
    assert locks == locks[:1] * 3
    assert toy.lock()["stages"]["a"]["params"]["params.yaml"]["a"]["text"] == "another"


def test_prefect_has_a_task_for_each_stage_and_only_what_changed_runs(tmp_path: Path, served: str) -> None:
    toy = build(tmp_path / "toy", DIAMOND, light=True)
    toy.dvc("repro")
    toy.forget_starts()
    toy.set("b", text="another")  # its output does not depend on it: d stays as it is
    results = json.loads(toy.lifecycle("run", "--json").stdout)

    assert toy.starts() == ["b"]
    assert {entry["stage"]: entry["state"] for entry in results["stages"]} == {
        "a": "cached", "b": "done", "c": "cached", "d": "cached",
    }  # fmt: skip
    flow_run = ask(served, "flow_runs")[0]
    assert flow_run["state_name"] == "Completed"
    assert flow_run["name"] == "b +1"
    conditions = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}}
    tasks = ask(served, "task_runs", **conditions)
    assert {task["name"]: task["state_name"] for task in tasks} == {
        "a": "Cached", "b": "Done", "c": "Cached", "d": "Cached",
    }  # fmt: skip
    artifacts = {artifact["key"]: artifact for artifact in ask(served, "artifacts", **conditions)}
    rows = json.loads(artifacts["stages"]["data"])
    assert [row["stage"] for row in rows] == ["a", "b", "c", "d"]
    assert artifacts["summary"]["data"].startswith("# b +1")


def test_a_failing_stage_stops_only_what_depends_on_it_and_only_crashes_are_retried(
    tmp_path: Path, served: str
) -> None:
    graph = {
        "wrong": [], "after_wrong": ["wrong"], "gate": [], "crash": [], "again": [],
        "killed": [], "after_killed": ["killed"],
    }  # fmt: skip
    toy = build(tmp_path / "toy", graph)
    toy.set("wrong", outcome="wrong data")
    toy.set("gate", outcome="gate")
    toy.set("crash", outcome="crash")
    toy.set("killed", outcome="kill once")
    toy.set("again", outcome="again once")
    with Webhook() as hook:
        done = toy.lifecycle("run", "--json", code=2, LIFECYCLE_WEBHOOK=hook.address)

    assert sorted(hook.events) == ["failure", "failure", "gate"]
    assert hook.address not in done.stderr
    results = {entry["stage"]: entry for entry in json.loads(done.stdout)["stages"]}
    assert {name: entry["state"] for name, entry in results.items()} == {
        "wrong": "failed", "after_wrong": "not run", "gate": "failed", "crash": "failed", "killed": "done",
        "after_killed": "done", "again": "done",
    }  # fmt: skip
    assert {name: toy.starts().count(name) for name in graph} == {
        "wrong": 1, "after_wrong": 0, "gate": 1, "crash": 2, "killed": 2, "after_killed": 1, "again": 2,
    }  # fmt: skip
    assert [results[name]["code"] for name in ("wrong", "gate", "crash")] == [2, 3, 1]
    assert [results[name]["message"] for name in ("killed", "again")] == ["", ""], "of the attempt that counts"
    assert "wrong failed: row 7: output is empty; fill it in" in done.stderr
    assert "RuntimeError: boom" in done.stderr, "the end of a crashed stage's output is shown"
    assert toy.record("again")["attempt"] == 2
    assert ask(served, "flow_runs")[0]["state_name"] == "Failed"


def test_a_stage_past_its_timeout_is_ended(tmp_path: Path, served: str) -> None:
    toy = build(tmp_path / "toy", {"slow": []}, meta={"slow": {"timeout": 2.5, "retries": 0}})
    toy.set("slow", outcome="wait")
    done = toy.lifecycle("run", code=1)
    assert "slow failed: took longer than 2.5 s" in done.stderr
    assert not toy.alive()


def test_two_flows_one_workspace(tmp_path: Path, served: str) -> None:
    """The second is sent away; `lifecycle status` and `dvc status` beside a run do not disturb it."""
    toy = build(tmp_path / "toy", {"a": [], "b": ["a"]})
    toy.set("a", outcome="wait")
    first = toy.start("run")
    toy.await_stage("a")
    second = toy.lifecycle("run", code=75)
    assert second.stderr.count("\n") == 1
    assert f"another run has this workspace (process {first.pid})" in second.stderr
    entries = {
        entry["stage"]: entry for entry in json.loads(toy.lifecycle("status", "--json").stdout)["stages"]
    }
    assert entries["a"]["state"] == "running"
    assert entries["a"]["process"] == toy.processes()[0]
    toy.dvc("status", code=None)
    toy.go()
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 0, output
    assert toy.starts() == ["a", "b"]


def test_a_flow_beside_dvc_repro_waits_for_it(
    unstarted: Toy, expected_lock: dict[str, Any], tmp_path: Path, served: str
) -> None:
    toy = unstarted.copy(tmp_path / "toy")
    command = [sys.executable, "-m", "dvc", "repro", "a"]
    other = subprocess.Popen(command, cwd=toy.root, env=toy.environment({}), stdout=subprocess.DEVNULL)
    toy.await_stage("a")
    flow = toy.start("run")
    read_until(flow, "a runs already as process")
    toy.go()
    output, _ = flow.communicate(timeout=60)
    assert flow.returncode == 0, output
    assert other.wait(timeout=60) == 0
    assert toy.starts() == ["a", "b"], "what dvc repro had begun was not run again"
    assert toy.lock() == expected_lock


def test_ctrl_c_ends_everything_and_the_next_run_goes_on(tmp_path: Path, served: str) -> None:
    toy = build(tmp_path / "toy", {"a": [], "b": ["a"]})
    toy.set("b", outcome="wait")
    run = toy.start("run", afresh=True)
    toy.await_stage("b")
    os.kill(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert "Traceback" not in output
    assert not toy.alive()
    assert toy.record("b")["exit_code"] == 143
    assert ask(served, "flow_runs")[0]["state_name"] == "Cancelled"
    toy.go()
    assert toy.settle().code == 0
    assert toy.starts() == ["a", "b", "b"]


@pytest.mark.parametrize("victim", ["flow", "dvc", "stage"])
def test_a_killed_run_leaves_no_orphan_and_the_next_one_converges(
    victim: str, unstarted: Toy, expected_lock: dict[str, Any], tmp_path: Path, served: str
) -> None:
    toy = unstarted.copy(tmp_path / "toy")
    run = toy.start("run")
    toy.await_stage("a")
    stage = toy.processes()[0]
    os.kill({"flow": run.pid, "dvc": os.getpgid(stage), "stage": stage}[victim], signal.SIGKILL)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == (-9 if victim == "flow" else 1), output
    until(lambda: not toy.alive(), "the stage to end itself", seconds=20)

    toy.go()
    assert toy.settle().code == 0
    assert toy.lock() == expected_lock
    assert toy.starts() == ["a", "a", "b"]


def test_without_any_prefect_the_stages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configured server is down, which costs a line; none can be started, which costs another."""
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.free_port()}/api")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "file"))  # no folder
    toy = build(tmp_path / "toy", {"a": [], "b": ["a"]}, light=True)
    done = toy.lifecycle("run")
    assert toy.output("b") == "ba"
    assert done.stderr.count("does not answer; a temporary one records this run") == 1
    assert done.stderr.count("Prefect lost the record of this run") == 1


def test_a_prefect_server_that_dies_takes_only_its_record_along(
    tmp_path: Path, prefect_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = build(tmp_path / "toy", {"a": [], "b": ["a"]})
    toy.set("a", outcome="wait")
    home = Path(shutil.copytree(prefect_template, tmp_path / "home"))
    with PrefectServer(tmp_path, home) as mortal:
        monkeypatch.setenv("PREFECT_API_URL", mortal.url)
        run = toy.start("run")
        toy.await_stage("a")
        mortal.kill()
        toy.go()
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    assert toy.starts() == ["a", "b"]
    assert "Traceback" not in output
    assert output.count("Prefect") == 1, output
    assert set(toy.lock()["stages"]) == {"a", "b"}


def test_files_of_dvc_that_a_crash_cut_short_are_put_out_of_the_way(tmp_path: Path, served: str) -> None:
    """Nothing is computed again: the outputs are in the cache."""
    toy = build(tmp_path / "toy", DIAMOND)
    toy.dvc("repro")
    lock = toy.root / "dvc.lock"
    before = lock.read_bytes()
    lock.write_bytes(before[: before.rindex(b":")])
    (toy.root / ".dvc" / "tmp" / "rwlock").write_text('{"write": {"data')
    toy.forget_starts()
    done = toy.lifecycle("run")
    assert toy.starts() == []
    assert lock.read_bytes() == before
    assert ".dvc/tmp/rwlock was cut short" in done.stderr
    assert "dvc.lock cannot be read" in done.stderr

    lock.write_bytes(b"<<<<<<< HEAD\n" + before)
    refused = toy.lifecycle("run", code=2)
    assert refused.stderr == "dvc.lock has merge conflicts: take one side (git checkout --ours dvc.lock)\n"


def test_a_flipped_byte_is_found_and_the_command_that_is_named_mends_it(tmp_path: Path, served: str) -> None:
    toy = build(tmp_path / "toy", {"a": [], "b": ["a"]})
    toy.dvc("repro")
    whole = toy.output("a")
    damaged = flip_byte(toy, "a")
    assert "up to date" in toy.dvc("status").stdout, "DVC itself does not see it"
    done = toy.lifecycle("verify", code=3)
    assert str(damaged.relative_to(toy.root)) in done.stdout
    assert "data/a.txt of a" in done.stdout
    command = done.stdout.partition("mend it:")[2].strip()
    mended = toy.call(["sh", "-c", command], 0, {"PYTHONPATH": str(toy.root)})
    assert "a: done" in mended.stderr
    toy.lifecycle("verify")
    assert toy.output("a") == whole


def flip_byte(toy: Toy, stage: str) -> Path:
    """Change one byte of a cached output, and nothing that DVC looks at."""
    digest = toy.lock()["stages"][stage]["outs"][0]["md5"]
    path = toy.root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
    times = path.stat()
    path.chmod(0o644)
    contents = bytearray(path.read_bytes())
    contents[0] ^= 1
    path.write_bytes(contents)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    path.chmod(0o444)
    return path


def test_a_full_disk_costs_the_run_but_not_the_next_one(tmp_path: Path, served: str) -> None:
    """The cache is on a small disk that is full when DVC wants to commit the output."""
    toy = build(tmp_path / "toy", {"a": []})
    cache = toy.root / ".dvc" / "cache"
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(cache)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        filler = cache / "filler"
        toy.set("a", text="long " * 2000)
        with filler.open("wb") as file:
            file.write(b"x" * 60_000)
        failed = toy.lifecycle("run", code=75)
        assert "a failed: No space left on device" in failed.stderr
        assert toy.starts() == ["a"], "tried again, DVC would first delete what the stage has made"
        filler.unlink()
        assert toy.settle().code == 0
        assert verify.damaged(toy.root) == []
        assert set(toy.lock()["stages"]) == {"a"}
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)


def test_a_run_that_waits_for_people_is_paused_and_can_be_resumed(tmp_path: Path, served: str) -> None:
    toy = toy_that_waits(tmp_path / "toy")
    rankings.note_path(toy.root).write_text("http://127.0.0.1:7861")
    process = toy.start("run", "--wait-for-rankings", "9", "--deadline", "2h")

    def newest() -> dict[str, Any]:
        return next(iter(ask(served, "flow_runs")), {"state": {"type": ""}})

    until(lambda: newest()["state"]["type"] == "PAUSED", "the pause")
    message = "waiting for 9 rankings, 0 are there: rank answers at http://127.0.0.1:7861"
    assert newest()["state"]["message"] == message
    assert toy.starts() == ["prepare"]
    resume = f"{served}/flow_runs/{newest()['id']}/resume"
    urllib.request.urlopen(urllib.request.Request(resume, b"{}", {"Content-Type": "application/json"})).close()
    output, _ = process.communicate(timeout=CHILD_SECONDS)
    assert process.returncode == 0, output
    assert newest()["state"]["type"] == "COMPLETED"
    assert toy.starts() == ["prepare", "feedback", "reward"]
