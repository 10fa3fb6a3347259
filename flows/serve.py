"""The schedule server: serves the deployments of prefect.yaml from this workspace, until Ctrl-C.

It uses the Prefect server that is configured, or starts one of its own, whose records outlive it. A server that
goes away is waited for; then the schedules go on.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, Literal

import yaml

from flows import server
from flows.processes import end_group
from tasks.stage.errors import UserError, one_line, say

FILE = Path("prefect.yaml")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_START = 600  # nobody waits at the terminal


def serve(
    root: Path,
    name: str,
    cron: str | None,
    interval: str | None,
    timezone: str,
    overlap: Literal["wait", "skip"],
    port: int,
) -> None:
    """Serve the deployments, the one called `name` on a schedule if there is one, until KeyboardInterrupt.

    Raises UserError for a wrong schedule or prefect.yaml, an unknown deployment, or a port in use.
    """
    if cron is not None and interval is not None:
        raise UserError("--cron and --interval: choose one")
    every = None if interval is None else _length(interval)
    entries = _deployments(root)
    if name not in entries:
        raise UserError(f"--deployment {name}: {FILE} has {', '.join(entries)}")
    chosen = server.configured(root)
    url = chosen or f"http://127.0.0.1:{port}/api"
    if chosen is None and not server.is_free(port):
        raise UserError(f"port {port} is in use: choose another with --port")
    os.environ["PREFECT_API_URL"] = url  # read by Prefect when it is imported
    with _server(root, url, None if chosen else port) as home, contextlib.suppress(KeyboardInterrupt):
        from flows import deployments  # takes as long as a server takes to start

        schedule = deployments.schedule(cron, every, timezone)
        served = deployments.build(entries, name, schedule, overlap)
        when = f"at {cron} ({timezone})" if cron else f"every {interval}" if interval else "when asked"
        names = ", ".join(entries)
        while True:
            home.await_answer()
            try:
                runner = deployments.register(served)
                sys.stdout.write(f"serving {names}; {name} runs {when}; Prefect is at {url}; Ctrl-C ends it\n")
                sys.stdout.flush()
                deployments.start_what_is_due(runner)
            except deployments.Away as error:
                say(f"the Prefect server went away ({one_line(error)[:120]})")
                time.sleep(SECONDS_BETWEEN_LOOKS)


def _length(text: str) -> timedelta:
    """`6h` as a length of time. Raises UserError."""
    if not (found := re.fullmatch(r"([1-9][0-9]*)([smhd])", text)):
        raise UserError(f"--interval {text}: expected a number and its unit, such as 30m, 6h or 1d")
    return timedelta(**{UNITS[found[2]]: int(found[1])})


def _deployments(root: Path) -> dict[str, dict[str, Any]]:
    """The entries of prefect.yaml by name. Raises UserError when there are none."""
    path = root / FILE
    if not path.is_file():
        raise UserError(f"no {FILE} here: it names the deployments that are served")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
        return {entry["name"]: entry for entry in found}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{FILE}: expected a list `deployments` with names ({one_line(error)})") from None


class _Server:
    """A Prefect server at `url`: our own, which is started again whenever it has ended, or another one."""

    def __init__(self, root: Path, url: str, port: int | None) -> None:
        self.url, self._root, self._port = url, root, port
        self.process = None if port is None else server.start(root, port)

    def await_answer(self) -> None:
        """Wait until it answers."""
        told = False
        while not server.answers(self.url):
            if self._port is not None:
                self._await_own(self._port)
            elif not told:
                told = True
                say(f"the Prefect server {self.url} does not answer: waiting for it")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _await_own(self, port: int) -> None:
        say("the Prefect server starts (some ten seconds) …")
        if self.process is None or self.process.poll() is not None:
            self.process = server.start(self._root, port)
        server.await_start(self.url, self.process, Event(), SECONDS_TO_START)

    def end(self) -> None:
        if self.process is not None:
            end_group(self.process, seconds=10)


@contextlib.contextmanager
def _server(root: Path, url: str, port: int | None) -> Iterator[_Server]:
    """The server at `url`; on `port` it is ours, and runs by hand in this workspace are recorded there too."""
    home = _Server(root, url, port)
    note = server.note_path(root)
    try:
        if port is not None:
            note.write_text(url, encoding="utf-8")
        yield home
    finally:
        if port is not None:
            note.unlink(missing_ok=True)
        home.end()
