"""A Prefect server for the tests, and what it has on record."""

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any, Self

import command_host

from flows import server

TRIES = 30


class PrefectServer:
    """A server with its records in `home`; it may be killed and started again where it was."""

    def __init__(self, folder: Path, home: Path) -> None:
        (folder / ".work").mkdir(exist_ok=True)
        self.folder, self.home, self.port = folder, home, server.free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.process: command_host.Command | None = None

    def __enter__(self) -> Self:
        environment = {**os.environ, **server.ENVIRONMENT, "PREFECT_HOME": str(self.home)}
        command = [sys.executable, "-m", "prefect", *server.arguments(self.port, "--no-ui")]
        self.process = command_host.start(
            command, self.folder, environment, self.folder / ".work" / "prefect-server.log"
        )
        server.await_start(self.url, self.process, Event(), seconds=300)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def ask(url: str, what: str, **conditions: Any) -> list[dict[str, Any]]:
    """What the server has on record, newest first."""
    found: list[dict[str, Any]] = post(url, f"{what}/filter", conditions)
    return sorted(found, key=lambda each: str(each["created"]), reverse=True)


def post(url: str, what: str, body: Mapping[str, Any]) -> Any:
    """The answer of the server to a POST. Raises urllib.error.HTTPError for one that it refuses.

    503 is no refusal: SQLite was locked, and the server asks to be asked again, as Prefect's own client does.
    """
    request = urllib.request.Request(
        f"{url}/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(TRIES):
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(float(error.headers.get("Retry-After") or 1))
    raise TimeoutError(f"the server was busy each of {TRIES} times")
