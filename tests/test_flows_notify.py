"""Messages to a webhook: what is told to a real endpoint, and that none can do harm or be given away."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from webhook import Webhook

from flows import cli, notify, pipeline, promote, server
from flows.run import Run
from tasks.stage.errors import GateRefused

MESSAGE = notify.Message("failure", "a failed: boom")


def ended(root: Path, guard_events: int = 0, **states: tuple[str, int, str]) -> Run:
    """A run whose stages ended as told: state, exit code, message."""
    meta = pipeline.Meta(**pipeline.USUAL_META)
    stages = {name: pipeline.Stage(name, name, (), (), meta) for name in states}
    run = Run(root, stages, dict.fromkeys(states, ()), frozenset(states), jobs=1)
    for name, (state, code, message) in states.items():
        result = run.results[name]
        result.state, result.code, result.message = state, code, message  # type: ignore[assignment]
    (root / "metrics").mkdir()
    found = {"guard_events": guard_events, "stopped_because": "slot_f1 fell"}
    (root / "metrics" / "ppo.json").write_text(json.dumps(found))
    run.flow_run_url = "http://prefect.example/flow-runs/flow-run/7"
    return run


def test_failures_gates_and_guards_are_told_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ended(
        tmp_path, guard_events=2, prepare=("cached", 0, ""), base=("failed", 1, "boom"),
        evaluate=("failed", 3, "rougeL 0.4 is below 0.5"), ppo=("done", 0, ""), prune=("not run", 0, ""),
    )  # fmt: skip
    with Webhook() as hook:
        monkeypatch.setenv("LIFECYCLE_WEBHOOK", hook.address)
        notify.tell_of(run)
    assert {message["event"]: message["text"] for message in hook.received} == {
        "failure": "base failed: boom",
        "gate": "evaluate failed: rougeL 0.4 is below 0.5",
        "guard": "the guard of ppo spoke 2 times; it ended because: slot_f1 fell",
    }
    assert hook.received[0]["links"] == {"prefect": run.flow_run_url}
    assert hook.received[0]["run"]["title"] == run.title


@pytest.mark.parametrize(
    ("guard_events", "state"), [(0, "done"), (2, "cached")], ids=["quiet guard", "of an earlier run"]
)
def test_a_run_that_went_well_is_not_told(tmp_path: Path, guard_events: int, state: str) -> None:
    assert list(notify.messages(ended(tmp_path, guard_events, ppo=(state, 0, "")))) == []


def test_a_run_that_was_stopped_is_not_told(tmp_path: Path) -> None:
    run = ended(tmp_path, base=("failed", 143, "stopped"))
    run.stop.set()
    assert list(notify.messages(run)) == []


def test_without_an_address_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LIFECYCLE_WEBHOOK", raising=False)
    notify.send(MESSAGE)
    assert capsys.readouterr().err == ""


@contextmanager
def silent() -> Iterator[str]:
    """An endpoint that takes the call and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/secret-part"


@contextmanager
def refusing() -> Iterator[str]:
    with Webhook(status=500) as hook:
        yield hook.address


@contextmanager
def nobody() -> Iterator[str]:
    yield f"http://127.0.0.1:{server.free_port()}/secret-part"


@contextmanager
def no_address() -> Iterator[str]:
    yield "hooks.example/secret-part"


@contextmanager
def no_port() -> Iterator[str]:
    yield "http://hooks.example:secret-part/"


@pytest.mark.parametrize("endpoint", [silent, refusing, nobody, no_address, no_port])
def test_a_failing_endpoint_costs_one_line_that_does_not_give_it_away(
    endpoint: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notify, "SECONDS_TO_ANSWER", 0.2)
    with endpoint() as address:
        monkeypatch.setenv("LIFECYCLE_WEBHOOK", address)
        notify.send(MESSAGE)
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and said.count("\n") == 1
    assert "secret-part" not in said


def test_what_is_secret_in_a_message_is_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "correct horse")
    with Webhook() as hook:
        monkeypatch.setenv("LIFECYCLE_WEBHOOK", hook.address)
        notify.send(notify.Message("failure", "base failed: correct horse was refused"))
    assert hook.received[0]["text"] == "base failed: *** was refused"


def test_a_version_that_a_gate_refuses_is_told(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # those of this process stay
    monkeypatch.setattr("flows.workspace.lock_path", lambda _: tmp_path / "lock")
    monkeypatch.setattr("flows.workspace.prepare", lambda _: None)
    monkeypatch.setattr(promote, "judge", lambda _: (None, None, []))
    monkeypatch.setattr(promote, "show", lambda *_: None)

    def refuse(*_: object) -> None:
        raise GateRefused("version 2 is not promoted: 1 of 3 gates said no\nrougeL: 0.4")

    monkeypatch.setattr(promote, "promote", refuse)
    with Webhook() as hook:
        monkeypatch.setenv("LIFECYCLE_WEBHOOK", hook.address)
        done = CliRunner().invoke(cli.app, ["promote"])
    assert done.exit_code == 3
    assert [(message["event"], message["text"]) for message in hook.received] == [
        ("gate", "version 2 is not promoted: 1 of 3 gates said no\nrougeL: 0.4")
    ]
