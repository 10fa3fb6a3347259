"""The servers of infra/, real ones, through one life: runs, logins, backup, restore, and no secret anywhere."""

import base64
import json
import os
import shutil
import signal
import ssl
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from toy import Toy, build, until

from flows.processes import end_group
from infra import keep, settings, stack
from infra.stack import Stack

STAGE = "one"
PLANTED = "planted-in-the-environment-of-a-run"
ARTIFACT = b"an artifact that no client has keys for"


@pytest.fixture(scope="module")
def running() -> Iterator[Stack]:
    """The stack, started empty. Its folder is one that PostgreSQL's user can reach."""
    if shutil.which("caddy") is None or not _has_postgres():
        problem = "PostgreSQL and Caddy are needed: tests/install_servers"
        if "CI" in os.environ:
            pytest.fail(problem)
        pytest.skip(problem)
    folder = Path(tempfile.mkdtemp(prefix="stack-"))
    folder.chmod(0o711)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_SERVER_REGISTER_BLOCKS_ON_START", "false")  # no test needs them
            with stack.started(folder) as servers:
                yield servers
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def lived(running: Stack, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A repository whose pipeline a worker has run: the servers know of it, its outputs are in the store."""
    toy = build(tmp_path_factory.mktemp("lived") / "toy", {STAGE: []})
    project = yaml.safe_load((repository / "prefect.yaml").read_text())
    project["deployments"] = project["deployments"][:1]  # the others want stages that the toy has not
    (toy.root / "prefect.yaml").write_text(yaml.safe_dump(project))
    config = toy.root / ".dvc" / "config"
    config.write_text(config.read_text().replace("url = storage", "url = s3://dvc/lifecycle"))
    environment = running.client | {"MY_API_TOKEN": PLANTED}
    with worker(running, toy, environment) as started:
        deployment = "deployments/name/scheduled-lifecycle/lifecycle"
        until(lambda: prefect(running, deployment)[0] == 200, "the deployments", 120)
        _, found = prefect(running, deployment)
        _, flow = prefect(running, f"deployments/{found['id']}/create_flow_run", {})

        def has_ended() -> bool:
            assert started.poll() is None, (running.folder / "worker.log").read_text()
            state = prefect(running, f"flow_runs/{flow['id']}")[1]["state_type"]
            return state not in ("SCHEDULED", "PENDING", "RUNNING")

        until(has_ended, "the run", 240)
    toy.call(["dvc", "push"], 0, environment)
    return toy


@contextmanager
def worker(running: Stack, toy: Toy, environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The worker of compose.yaml in the toy repository, as a plain process."""
    own = {"HOME": str(toy.root / ".work" / "worker"), "PREFECT_WORKER_WEBSERVER_PORT": "0"}
    with (running.folder / "worker.log").open("wb") as log:
        started = subprocess.Popen(
            ["sh", stack.INFRA / "worker"], cwd=toy.root, stdout=log, stderr=subprocess.STDOUT,
            env=toy.environment({**environment, **own, "LIFECYCLE_TRACKING": "on"}), start_new_session=True,
        )  # fmt: skip
    try:
        yield started
    finally:
        end_group(started, seconds=20)


def _has_postgres() -> bool:
    try:
        return stack.postgres_programs().is_dir()
    except SystemExit:
        return False


def ask(
    running: Stack,
    url: str,
    body: Mapping[str, Any] | bytes | None = None,
    login: str | None = None,
    **more: str,
) -> tuple[int, Any]:
    """(status, answer) of a server. `body` makes it a POST, bytes a PUT; `login` is NAME:PASSWORD."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/octet-stream" if isinstance(body, bytes) else "application/json"}
    if login is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    request = urllib.request.Request(
        url, data, headers | more, method="PUT" if isinstance(body, bytes) else None
    )
    try:
        with opener(running.client["SSL_CERT_FILE"]).open(request, timeout=60) as answer:
            text = answer.read()
            status = answer.status
    except urllib.error.HTTPError as error:
        text, status = error.read(), error.code
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


@cache
def opener(authorities: str) -> urllib.request.OpenerDirector:
    """Opens https addresses that `authorities` vouch for, and asks no proxy. Reading that file is slow."""
    context = ssl.create_default_context(cafile=authorities)
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )


def mlflow(
    running: Stack, path: str, body: Any = None, login: str | None = None, **more: str
) -> tuple[int, Any]:
    login = login or f"admin:{running.settings['MLFLOW_ADMIN_PASSWORD']}"
    return ask(running, f"{running.client['MLFLOW_TRACKING_URI']}/api/2.0/{path}", body, login, **more)


def prefect(running: Stack, path: str, body: Any = None) -> tuple[int, Any]:
    login = f"admin:{running.settings['PREFECT_PASSWORD']}"
    return ask(running, f"{running.client['PREFECT_API_URL']}/{path}", body, login)


def shown(running: Stack) -> dict[str, Any]:
    """What the pages of both servers show of runs."""
    _, found = mlflow(running, "mlflow/experiments/get-by-name?experiment_name=lifecycle")
    experiment = found["experiment"]["experiment_id"]
    _, runs = mlflow(running, "mlflow/runs/search", {"experiment_ids": [experiment]})
    _, flows = prefect(running, "flow_runs/filter", {})
    kept = ("id", "name", "state_type", "start_time", "end_time")
    return {"runs": runs["runs"], "flows": [{key: flow[key] for key in kept} for flow in flows]}


def test_what_a_worker_ran_is_recorded_by_both_servers(running: Stack, lived: Toy) -> None:
    found = shown(running)
    assert [run["info"]["status"] for run in found["runs"]] == ["FINISHED", "FINISHED"]  # pipeline and stage
    assert [flow["state_type"] for flow in found["flows"]] == ["COMPLETED"]


@pytest.mark.parametrize("login", [None, "admin:", "admin:password", "admin:wrong", "nobody:wrong"])
def test_both_servers_want_a_login_before_and_behind_the_proxy(running: Stack, login: str | None) -> None:
    addresses = [running.addresses[name] for name in ("mlflow:5000", "prefect:4200")]
    for url in (
        running.client["MLFLOW_TRACKING_URI"],
        f"{running.client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=1",
        f"http://{addresses[0]}/api/2.0/mlflow/experiments/search?max_results=1",
        running.client["PREFECT_API_URL"].removesuffix("/api"),
        f"{running.client['PREFECT_API_URL']}/admin/settings",
        f"{running.client['PREFECT_API_URL']}/logs/out",
        f"http://{addresses[1]}/api/admin/settings",
    ):
        assert ask(running, url, login=login)[0] == 401, url


def test_nothing_listens_beyond_this_machine(running: Stack) -> None:
    ours = set(running.processes())
    sockets = [
        found for found in psutil.net_connections("inet") if found.pid in ours and found.status == "LISTEN"
    ]
    assert len({found.laddr.port for found in sockets}) >= len(running.addresses) + len(running.outside)
    assert {found.laddr.ip for found in sockets} == {"127.0.0.1"}


def test_health_is_open_since_clients_ask_it_first(running: Stack) -> None:
    assert ask(running, f"{running.client['PREFECT_API_URL']}/health") == (200, True)
    assert ask(running, f"{running.client['MLFLOW_TRACKING_URI']}/health")[0] == 200


def test_mlflow_answers_no_page_of_another_site_and_a_new_user_may_see_nothing(
    running: Stack, lived: Toy
) -> None:
    search = "mlflow/experiments/search?max_results=1"
    assert mlflow(running, search)[0] == 200
    address = running.addresses["mlflow:5000"]
    login = f"admin:{running.settings['MLFLOW_ADMIN_PASSWORD']}"
    assert ask(running, f"http://{address}/api/2.0/{search}", login=login, Host="evil.example.org")[0] == 403
    user = {"username": "guest", "password": "a-long-password"}
    assert mlflow(running, "mlflow/users/create", user)[0] == 200
    run = shown(running)["runs"][0]["info"]["run_id"]
    assert mlflow(running, f"mlflow/runs/get?run_id={run}")[0] == 200
    assert mlflow(running, f"mlflow/runs/get?run_id={run}", login="guest:a-long-password")[0] == 403


def test_what_was_backed_up_is_there_again_in_empty_servers(running: Stack, lived: Toy, tmp_path: Path) -> None:
    run = shown(running)["runs"][0]["info"]
    path = f"mlflow-artifacts/artifacts/{run['experiment_id']}/{run['run_id']}/artifacts/note.txt"
    assert mlflow(running, path, ARTIFACT)[0] == 200
    before = shown(running)
    running.keep("backup", str(tmp_path / "kept"))
    with tarfile.open(tmp_path / "kept" / "mlflow.tar") as archive:
        kept = {name.rpartition("/")[2] for name in archive.getnames()}
    assert kept == {"note.txt", "lifecycle.html"}  # one of this test, and the page that the run has sent

    running.send(signal.SIGSTOP, "prefect", "mlflow")  # starting them anew takes long
    running.stop("postgres", "store")
    shutil.rmtree(running.folder / "postgres")
    running.start_postgres()
    running.start_store()
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "kept", damaged)
    with (damaged / "dvc.tar").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(SystemExit, match=r"dvc\.tar was damaged"):
        running.keep("restore", str(damaged))
    running.keep("restore", str(tmp_path / "kept"))
    with pytest.raises(SystemExit, match="the store is not empty"):
        running.keep("restore", str(tmp_path / "kept"))
    running.send(signal.SIGCONT, "prefect", "mlflow")

    until(lambda: mlflow(running, f"mlflow/runs/get?run_id={run['run_id']}")[0] == 200, "MLflow")
    until(lambda: prefect(running, "flow_runs/filter", {})[0] == 200, "Prefect")
    assert shown(running) == before
    assert mlflow(running, path)[1] == ARTIFACT
    shutil.rmtree(lived.root / ".dvc" / "cache")
    shutil.rmtree(lived.root / "data")
    lived.call(["dvc", "pull"], 0, running.client)
    assert lived.output(STAGE) == f"{STAGE}: {STAGE}\n"


def test_no_secret_is_in_a_log_a_database_an_object_or_the_repository(
    running: Stack, lived: Toy, tmp_path: Path
) -> None:
    """The passwords of the servers and of the run, and a token planted in its environment."""
    running.keep("backup", str(tmp_path / "kept"))
    for name in keep.DATABASES:
        command = [stack.postgres_programs() / "pg_restore", "--file", tmp_path / f"{name}.sql"]
        subprocess.run([*command, tmp_path / "kept" / f"{name}.dump"], check=True)
    secrets = [PLANTED, *(running.settings[name] for name in (*settings.MADE, "PREFECT_LOGIN"))]
    places = [*running.folder.glob("*.log"), *tmp_path.glob("*.sql"), *tmp_path.glob("kept/*.tar")]
    assert len(places) == 6 + len(keep.DATABASES) + len(keep.BUCKETS)
    places += [path for path in lived.root.rglob("*") if path.is_file()]
    leaks = [path for path in places if any(secret.encode() in path.read_bytes() for secret in secrets)]
    assert leaks == []
    assert (running.folder / ".env").stat().st_mode & 0o777 == 0o600
