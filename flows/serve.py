"""The schedule server: serves the deployments of prefect.yaml from this workspace, until Ctrl-C.

It uses the Prefect server that is configured, or starts one of its own, whose records outlive it. A server that
goes away is waited for; then the schedules go on.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Literal

from flows import server
from flows.processes import end_group
from tasks.stage.errors import UserError, one_line, say

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
    chosen = server.configured(root)
    url = chosen or f"http://127.0.0.1:{port}/api"
    if chosen is None and not server.is_free(port):
        raise UserError(f"port {port} is in use: choose another with --port")
    os.environ["PREFECT_API_URL"] = url  # read by Prefect when it is imported
    with _server(root, url, None if chosen else port) as home, contextlib.suppress(KeyboardInterrupt):
        from flows import deployments  # takes as long as a server takes to start

        schedule = deployments.schedule(cron, interval, timezone)
        served = deployments.read(root, name, schedule, overlap)
        when = f"at {cron} ({timezone})" if cron else f"every {interval}" if interval else "when asked"
        names = ", ".join(deployment.name for deployment in served)
        while True:
            home.await_answer()
            try:
                deployments.register(served)
                sys.stdout.write(f"serving {names}; {name} runs {when}; Prefect is at {url}; Ctrl-C ends it\n")
                sys.stdout.flush()
                deployments.serve(served)
            except Exception as error:
                if server.answers(url):
                    raise
                say(f"Prefect went away: {one_line(error)[:120]}")


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
