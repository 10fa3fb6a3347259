"""Which Prefect server records a run: the configured one, that of `lifecycle ui` or `serve`, or one for now.

Prefect starts a temporary server by itself too; ours is up in half the time, because it starts while Prefect is
being imported, and it does not outlive a flow that is killed.
"""

import os
import socket
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from flows import child
from flows.processes import Stopped, end_group
from tasks.stage.errors import TryAgain

ENVIRONMENT = {"PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false"}  # nobody here uses them
SECONDS_TO_START = 90
SECONDS_TO_ANSWER = 3.0
SECONDS_BETWEEN_LOOKS = 0.1


def configured(root: Path) -> str | None:
    """The address of the server that was chosen: by PREFECT_API_URL, by the active Prefect profile, or by
    keeping `lifecycle ui` or `lifecycle serve` open in this workspace. None when there is none."""
    return os.environ.get("PREFECT_API_URL") or _profile_url() or noted(root)


def noted(root: Path) -> str | None:
    """The address of the server that `lifecycle ui` or `lifecycle serve` runs in this workspace, or None."""
    note = note_path(root)
    url = note.read_text(encoding="utf-8") if note.is_file() else None
    return url if url and answers(url) else None


def note_path(root: Path) -> Path:
    """Where `lifecycle ui` and `lifecycle serve` leave the address of their server."""
    return root / ".work" / "prefect-server"


def answers(url: str) -> bool:
    """Whether a Prefect server is up at `url` (…/api)."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=SECONDS_TO_ANSWER) as answer:  # noqa: S310
            return bool(answer.read().strip() == b"true")
    except (OSError, ValueError):
        return False


@contextmanager
def temporary(root: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server as long as the block lasts. It gets address and process before the server is up."""
    port = free_port()
    process = start(root, port, "--no-ui")
    try:
        yield f"http://127.0.0.1:{port}/api", process
    finally:
        end_group(process, seconds=5)


def arguments(port: int, *options: str) -> tuple[str, ...]:
    """What `prefect` is told to start a server on this machine alone."""
    return ("server", "start", "--host", "127.0.0.1", "--port", str(port), *options)


def start(root: Path, port: int, *options: str) -> subprocess.Popen[bytes]:
    """Start a server on this machine alone; it ends with this process."""
    log = root / ".work" / "prefect-server.log"
    with log.open("wb") as output:
        return subprocess.Popen(
            child.command("prefect", *arguments(port, *options)),
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def await_start(
    url: str, process: subprocess.Popen[bytes], stop: Event, seconds: float = SECONDS_TO_START
) -> None:
    """Wait until the server `process` answers at `url`.

    Raises TryAgain when it has ended or does not answer after `seconds`, Stopped once `stop` is set.
    """
    end = time.monotonic() + seconds
    while not answers(url):
        if process.poll() is not None:
            raise TryAgain("the Prefect server ended while it started: see .work/prefect-server.log")
        if time.monotonic() > end:
            raise TryAgain(
                f"the Prefect server at {url} did not start in {seconds:g} s (.work/prefect-server.log)"
            )
        if stop.wait(SECONDS_BETWEEN_LOOKS):
            raise Stopped


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(port: int) -> bool:
    """Whether nobody listens on this port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _profile_url() -> str | None:
    """PREFECT_API_URL of the active Prefect profile."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).expanduser()
    if not path.is_file():
        return None
    profiles = tomllib.loads(path.read_text(encoding="utf-8"))
    active = os.environ.get("PREFECT_PROFILE", profiles.get("active"))
    url = profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return str(url) if url else None
