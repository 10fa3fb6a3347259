"""Messages to a webhook: a run failed, a guard spoke, a gate said no, a run crashed.

The address is in LIFECYCLE_WEBHOOK and nowhere else: it may be a secret, so it is never written or printed. A
message is JSON: `event`, `text` (which chat services show), `run` and `links`. Whatever the endpoint does, the
run is what it was.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flows import links
from flows.run import INTERRUPTED, Result, Run, metrics
from tasks.stage.errors import say
from tasks.stage.secrets import redacted

VARIABLE = "LIFECYCLE_WEBHOOK"
SECONDS_TO_ANSWER = 5.0
GATE = 3  # the exit code
MADE = ("done", "restored")


@dataclass(frozen=True)
class Message:
    """What is sent. `run` says which one it was; `links` are addresses to look at, by name."""

    event: Literal["failure", "guard", "gate", "crash"]
    text: str
    run: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)


def tell_of(run: Run) -> None:
    """Send what is worth telling of a run that has ended."""
    for message in messages(run):
        send(message)


def messages(run: Run) -> Iterator[Message]:
    """A message for each stage that failed, and for each whose guard spoke; none for a run that was stopped."""
    if run.code == INTERRUPTED:
        return
    for name, result in run.results.items():
        if result.state == "failed":
            event: Literal["gate", "failure"] = "gate" if result.code == GATE else "failure"
            yield _of(run, event, f"{name} failed: {result.message}", result)
        elif result.state in MADE and (events := metrics(run.root, name).get("guard_events")):
            because = metrics(run.root, name).get("stopped_because", "not told")
            yield _of(
                run, "guard", f"the guard of {name} spoke {events} times; it ended because: {because}", result
            )


def send(message: Message) -> None:
    """Send a message, if there is an address; says in one line that it was not taken, and never raises."""
    address = os.environ.get(VARIABLE)
    if not address:
        return
    if not address.startswith(("http://", "https://")):
        say(f"warning: {VARIABLE} is no http address: nobody was told ({message.event})")
        return
    body = json.dumps(redacted(asdict(message)), ensure_ascii=False).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER).close()  # noqa: S310
    except Exception as error:  # of many kinds, and their words may hold the address
        say(f"warning: the webhook of {VARIABLE} was not told ({message.event}): {_reason(error)}")


def _of(run: Run, event: Literal["failure", "guard", "gate"], text: str, result: Result) -> Message:
    found = {"prefect": run.flow_run_url, "mlflow": links.mlflow_run(run.mlflow_id) if run.mlflow_id else ""}
    return Message(
        event,
        text,
        {"title": run.title, "stage": result.stage, "exit_code": result.code, "flow_run": run.flow_run_id},
        {name: url for name, url in found.items() if url},
    )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"it answered {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return cause.strerror or type(cause).__name__ if isinstance(cause, OSError) else type(error).__name__
