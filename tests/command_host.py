"""Starts commands from a process that holds their libraries in memory: each is spared seconds of imports.

As stages are started by tasks/stage/warm.py, whose server this is with other libraries: the first test that
asks starts it, it forks a child for each command, and it ends with the test session. A command that runs to its
end is started in the plain way where its environment says something to Python itself (PYTHONPATH, ...).

    python tests/command_host.py ADDRESS RUNNER
"""

import atexit
import importlib
import importlib.abc
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import IO
from unittest.mock import patch

from tasks.stage import warm

# the host of all workers of this session lives as long as whoever started them
RUNNER = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
ADDRESS = f"\0lifecycle-commands-{os.getuid()}-{RUNNER}"
SECONDS_TO_START = 300.0  # on a machine that is busy with other things too
SECONDS_TO_END = 240.0
ARGUMENTS = "COMMAND_HOST_ARGUMENTS"
THERE = sys.platform == "linux"  # elsewhere there are no such addresses, and every command is started plainly
LIBRARIES = (
    "prefect.flow_engine", "prefect.task_engine", "prefect.artifacts", "prefect.client.orchestration",
    "prefect.events.worker", "prefect.futures", "prefect.runtime.flow_run", "prefect.task_runners",
    "prefect.cli._app", "prefect.cli.server", "prefect.cli._server_utils", "prefect.server.api.server",
    "uvicorn",
    "dvc.cli", "dvc.repo.reproduce", "dvc.repo.status", "dvc.commands.repro", "dvc.commands.status",
    "dvc.stage.cache", "dvc.fs.dvc", "dvc_data.hashfile.build", "dvc_http", "scmrepo.git", "networkx",
    "fastapi", "typer", "rich.table", "ruamel.yaml", "psutil", "mlflow.tracking", "transformers",
    "transformers.models.t5.modeling_t5",
)  # fmt: skip
_started: list[int] = []


class Command:
    """A command that runs: what a Popen of it would be, as far as tests ask.

    `stdout` has what it writes, to stderr too, unless it was given a file for that. It is killed when this
    process ends.
    """

    def __init__(self, connection: socket.socket, pid: int, stdout: IO[str] | None) -> None:
        self.pid, self.stdout, self.returncode = pid, stdout, None
        self._connection = connection

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                ended = self._connection.recv(warm.LARGEST_MESSAGE)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
            assert ended, "the host of the commands has ended"
            self._connection.close()
            self.returncode: int | None = int(ended)
        assert self.returncode is not None
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it has still to write until it ends."""
        assert self.stdout is not None
        with self.stdout:
            rest = self.stdout.read()
        self.wait(timeout)
        return rest, None


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float = SECONDS_TO_END
) -> "subprocess.CompletedProcess[str]":
    """As subprocess.run, with what the command writes to stdout and stderr.

    Raises subprocess.TimeoutExpired, and the command is killed then.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        started = _fork(command, folder, environment, out.fileno(), error.fileno())
        if started is None:
            return run_plainly(command, folder, environment, seconds)
        connection, pid = started
        with connection:
            code = Command(connection, pid, None).wait(seconds)
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), error.read())


def run_plainly(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float
) -> "subprocess.CompletedProcess[str]":
    """As `run`, by an interpreter of its own."""
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


def start(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path | None = None
) -> Command:
    """Start the command in a session of its own and leave it running; it writes to a pipe, or to `log`."""
    if log is not None:
        with log.open("wb") as output:
            started = _fork(command, folder, environment, output.fileno(), output.fileno())
        assert started is not None, "nothing for the host"
        return Command(*started, None)
    reading, writing = os.pipe()
    started = _fork(command, folder, environment, writing, writing)
    os.close(writing)
    assert started is not None, "nothing for the host"
    return Command(*started, os.fdopen(reading))


def _fork(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], out: int, error: int
) -> tuple[socket.socket, int] | None:
    """A connection that says when the command has ended, and its process id."""
    program, *arguments = command
    if not THERE or program != sys.executable or arguments[0] != "-m":
        return None
    said = {**environment, ARGUMENTS: json.dumps(arguments[2:])}
    connection = _connected()
    request = warm.Request(arguments[1], str(folder), said)
    socket.send_fds(connection, [json.dumps(asdict(request)).encode()], [out, error])
    pid = int(connection.recv(warm.LARGEST_MESSAGE) or 0)
    if pid == 0:
        connection.close()
        return None
    return connection, pid


def _connected() -> socket.socket:
    end = time.monotonic() + SECONDS_TO_START
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(ADDRESS)
            return connection
        except OSError:
            connection.close()
            assert time.monotonic() < end, "no host for the commands"
        if not _started:
            host = [sys.executable, __file__, ADDRESS[1:], str(RUNNER)]
            nothing = [
                (os.POSIX_SPAWN_OPEN, number, os.devnull, how, 0)
                for number, how in ((0, os.O_RDONLY), (1, os.O_WRONLY))
            ]
            _started.append(os.posix_spawn(sys.executable, host, os.environ, file_actions=nothing, setsid=True))
        time.sleep(0.05)


class Prefect(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Keeps Prefect out of sight until it is imported, since it reads its settings then."""

    def __init__(self) -> None:
        self._kept = {
            name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "prefect"
        }
        self._spec = self._kept["prefect"].__spec__

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name == "prefect" else None

    def create_module(self, _: ModuleSpec) -> ModuleType:
        sys.meta_path.remove(self)
        return self._kept["prefect"]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
        sys.modules.update(self._kept)
        from prefect.context import refresh_global_settings_context
        from prefect.logging.configuration import PROCESS_LOGGING_CONFIG, setup_logging

        refresh_global_settings_context()
        PROCESS_LOGGING_CONFIG.clear()
        setup_logging()


def _become(request: warm.Request, connection: socket.socket) -> None:
    """Run the module as if this process had been started for it; whoever asked takes it along."""

    def watch() -> None:
        connection.recv(1)  # comes back when the other end is closed
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="asked", daemon=True).start()
    os.setsid()
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = [request.module, *json.loads(os.environ.pop(ARGUMENTS))]
    sys.path[0] = request.folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "tasks"]:
        del sys.modules[name]  # the folder may have its own
    sys.meta_path.insert(0, Prefect())
    importlib.invalidate_caches()
    if request.module == "prefect":
        importlib.import_module("prefect")
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # so many libraries take most of a second to leave


if __name__ == "__main__":
    # a command sets up logging for itself
    with patch.multiple(warm, LIBRARIES=LIBRARIES, LATER=()), patch("logging.config.dictConfig"):
        forked = warm.serve(f"\0{sys.argv[1]}", int(sys.argv[2]))
    if forked is not None:
        _become(*forked)
