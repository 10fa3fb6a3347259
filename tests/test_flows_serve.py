"""`lifecycle serve` with a real Prefect server, on a toy repository: deployments, overlap, kills, restarts."""

import os
import shutil
import signal
import subprocess
import urllib.error
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect_server import PrefectServer, ask, post
from toy import Toy, build, read_until, until
from webhook import Webhook

from flows import workspace
from tasks.stage.lock import holder

GRAPH = {"prepare": [], "train": ["prepare"], "evaluate": ["train"]}


@pytest.fixture(scope="module")
def hook() -> Iterator[Webhook]:
    with Webhook() as listening:
        yield listening


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Toy:
    """Three stages, of which the second waits until it is let go; with the deployments of this repository."""
    toy = build(tmp_path_factory.mktemp("served") / "toy", GRAPH, meta={"train": {"retries": 0}})
    toy.set("train", outcome="wait")
    shutil.copy(repository / "prefect.yaml", toy.root)
    return toy


@pytest.fixture(scope="module")
def serving(
    toy: Toy, prefect_server: PrefectServer, prefect_home: Path, hook: Webhook
) -> Iterator[subprocess.Popen[str]]:
    """`lifecycle serve`, with a run of the full lifecycle each year."""
    serve = toy.start(
        "serve", "--cron", "0 0 1 1 *", afresh=True, PREFECT_API_URL=prefect_server.url,
        PREFECT_HOME=str(prefect_home), PREFECT_RUNNER_POLL_FREQUENCY="1", PREFECT_CLIENT_MAX_RETRIES="1",
        LIFECYCLE_WEBHOOK=hook.address,
    )  # fmt: skip
    seen = read_until(serve, "serving ")
    assert "lifecycle, evaluation, data-refresh; lifecycle runs at 0 0 1 1 * (UTC)" in seen
    yield serve
    os.kill(serve.pid, signal.SIGINT)
    output, _ = serve.communicate(timeout=120)
    assert serve.returncode == 0, output
    assert hook.address not in output
    assert all(each["paused"] for each in ask(prefect_server.url, "deployments")), "nobody would run them"


def start(url: str, deployment: str, seconds: float = 0, **parameters: Any) -> str:
    """Ask for a run, as Prefect's form does, `seconds` from now; its id."""
    found = {each["name"]: each["id"] for each in ask(url, "deployments")}
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    planned = {"type": "SCHEDULED", "state_details": {"scheduled_time": when.isoformat()}}
    body = {"parameters": parameters, "enforce_parameter_schema": True, "state": planned}
    return str(post(url, f"deployments/{found[deployment]}/create_flow_run", body)["id"])


def state(url: str, flow_run: str) -> tuple[str, str]:
    """(name, message) of a run's state."""
    [found] = ask(url, "flow_runs", flow_runs={"id": {"any_": [flow_run]}})
    return found["state_name"], found["state"]["message"] or ""


def await_end(url: str, flow_run: str) -> tuple[str, str]:
    until(
        lambda: state(url, flow_run)[0] in ("Completed", "Failed", "Crashed", "Skipped", "Cancelled"),
        f"the end of run {flow_run}", seconds=180,
    )  # fmt: skip
    return state(url, flow_run)


@pytest.mark.usefixtures("serving")
def test_the_deployments_and_their_parameters_are_what_the_form_shows(prefect_server: PrefectServer) -> None:
    found = {each["name"]: each for each in ask(prefect_server.url, "deployments")}
    assert set(found) == {"lifecycle", "evaluation", "data-refresh"}
    assert [name for name, each in found.items() if each["schedules"]] == ["lifecycle"]
    assert {name: each["parameters"] for name, each in found.items()} == {
        "lifecycle": {"refresh": True, "overlap": "wait"},
        "evaluation": {"stages": ["evaluate"], "alone": True, "overlap": "wait"},
        "data-refresh": {"stages": ["prepare"], "refresh": True, "overlap": "wait"},
    }
    for each in found.values():
        assert each["global_concurrency_limit"]["limit"] == 1
        assert each["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        properties = each["parameter_openapi_schema"]["properties"]
        assert properties["stages"]["items"]["enum"] == list(GRAPH)
        assert all(entry["description"] for entry in properties.values())
    until(
        lambda: bool(
            ask(prefect_server.url, "flow_runs", flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}})
        ),
        "the scheduler to plan a run",
    )
    [automation] = post(prefect_server.url, "automations/filter", {})
    assert automation["actions"][0]["state"] == "CRASHED"


@pytest.mark.parametrize(
    "parameters", [{"stages": ["nowhere"]}, {"settings": ["train.text"]}, {"overlap": "both"}], ids=str
)
@pytest.mark.usefixtures("serving")
def test_wrong_parameters_are_refused_by_the_form(
    parameters: dict[str, Any], prefect_server: PrefectServer
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        start(prefect_server.url, "lifecycle", **parameters)
    refused.value.close()
    assert refused.value.code == 409


@pytest.mark.usefixtures("serving")
def test_overlap_a_killed_run_a_server_that_is_restarted_and_nothing_to_do(
    toy: Toy, prefect_server: PrefectServer, hook: Webhook
) -> None:
    url = prefect_server.url
    killed = start(url, "lifecycle")
    toy.await_stage("train")

    skipped = start(url, "evaluation", overlap="skip")
    owner = holder(workspace.lock_path(toy.root))
    assert await_end(url, skipped) == (
        "Skipped", f"another run has this workspace (process {owner}); try again later, or wait with --wait",
    )  # fmt: skip

    assert owner is not None
    os.kill(owner, signal.SIGKILL)
    assert await_end(url, killed)[0] == "Crashed"
    until(lambda: hook.events == ["crash"], "the message of the crash")
    until(lambda: not toy.alive(), "the end of what it had started")

    asked = start(url, "lifecycle", seconds=14)  # later than `serve` fetches beforehand
    prefect_server.kill()
    toy.go()
    prefect_server.__enter__()
    assert await_end(url, asked) == ("Completed", "train, evaluate")
    assert toy.starts() == ["prepare", "train", "train", "evaluate"], "what was done is not done again"

    toy.forget_starts()
    nothing = start(url, "lifecycle")
    assert await_end(url, nothing) == ("Completed", "nothing to do: 3 stages are up to date")
    assert toy.starts() == []
    assert hook.events == ["crash"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cron", "0 3 * *"], "no schedule: "),
        (["--interval", "six hours"], "--interval six hours: expected a number and its unit, such as 30m"),
        (["--cron", "0 3 * * *", "--interval", "6h"], "--cron and --interval: choose one"),
        (["--deployment", "nightly"], "--deployment nightly: prefect.yaml has lifecycle, evaluation, data-"),
    ],
)
def test_a_wrong_schedule_is_told_in_one_line(
    arguments: list[str], message: str, toy: Toy, tmp_path: Path
) -> None:
    address = "http://127.0.0.1:9/api"
    done = toy.lifecycle("serve", *arguments, code=2, PREFECT_API_URL=address, PREFECT_HOME=str(tmp_path))
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
