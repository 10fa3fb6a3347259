"""Starts stages from a process that holds the heavy libraries in memory: each is spared ten seconds of imports.

A runner offers it by setting LIFECYCLE_WARM to its own process id (on Linux without a GPU: CUDA does not
survive a fork). The first stage that asks starts the host; it imports libraries, none of this project's code,
and lives as long as the runner. For each stage it forks a child, which becomes that stage in the folder and
environment of whoever asked. The process that asked stays, and stands for its child: it passes signals on, ends
as the child ended, and takes the child along when it is killed.

    python -m tasks.stage.warm ADDRESS RUNNER
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from tasks.stage import starter
from tasks.stage.errors import say

VARIABLE = "LIFECYCLE_WARM"
FOR_CHILDREN = "LIFECYCLE_WARM_CHILDREN"  # the same offer, for what a stage that was started so starts itself
LIBRARIES = ("torch", "transformers.trainer", "peft", "datasets", "trl", "transformers.models.t5.modeling_t5")
LATER = (  # what the first stage of a run can do without while it works
    "rouge_score.rouge_scorer", "sacrebleu", "sklearn.linear_model", "matplotlib.backends.backend_agg",
    "matplotlib.figure", "compressed_tensors", "ruamel.yaml",
)  # fmt: skip
LARGEST_MESSAGE = 2**17
SECONDS_TO_START = 60.0
SECONDS_BETWEEN_TRIES = 0.05
SECONDS_TO_END = 40.0  # what a stage may take to save its checkpoint, and time to spare


@dataclass(frozen=True)
class Request:
    """A stage to become: a module to run as `python -m` would, where, and with which environment."""

    module: str
    folder: str
    environment: dict[str, str]


class _Child:
    """The process that works for this one."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._asked = False

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """Pass a request to stop on."""
        self._asked = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._number, number)

    def end(self) -> None:
        """Whoever started this process is gone: ask once, since a second request would cut the saving short.

        The child dies with this process in any case.
        """
        if not self._asked:
            say("whoever started this stage is gone: stopping")
            self.ask(signal.SIGTERM)
        time.sleep(SECONDS_TO_END)
        os._exit(128 + signal.SIGTERM)


def stand_in() -> int | None:
    """Have the program of this process run by a child of the host, and return its exit code once it has ended.

    None when there is no host to be had, and in that child: the program goes on here. So it does when the
    interpreter was set otherwise than the host's (PYTHONPATH …). A child that a signal ended ends this process
    by the same signal.
    """
    runner, program = os.environ.get(VARIABLE), getattr(sys.modules["__main__"], "__spec__", None)
    if runner is None or program is None or not hasattr(os, "pidfd_open"):
        return None
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment[FOR_CHILDREN] = runner
    links = starter.links_to_starter()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # until there is a child
    try:
        connection = _connected(f"\0lifecycle-{os.getuid()}-{runner}", runner)
        if connection is None:
            return None
        request = Request(program.name, str(Path.cwd()), environment)
        socket.send_fds(connection, [json.dumps(asdict(request)).encode()], [1, 2])
        number = int(connection.recv(LARGEST_MESSAGE) or 0)
        if number == 0:
            return None
        child = _Child(number)
        for request_to_stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(request_to_stop, child.ask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    starter.watch(lambda: starter.intact(links), child.end, lambda: None)
    ended = connection.recv(LARGEST_MESSAGE)
    code = int(ended) if ended else -signal.SIGKILL  # a host that is gone cannot say
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def offer(environment: MutableMapping[str, str]) -> None:
    """Offer the host, in the environment of a process to be started, to that process too."""
    if FOR_CHILDREN in environment:
        environment[VARIABLE] = environment.pop(FOR_CHILDREN)


def _connected(address: str, runner: str) -> socket.socket | None:
    """A connection to the host, which is started if need be; None when it does not come up."""
    end, host = time.monotonic() + SECONDS_TO_START, None
    while time.monotonic() < end:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(address)
            return connection if _ours(connection) else None
        except OSError:
            connection.close()
        if host is None:
            command = [sys.executable, "-W", "ignore", "-m", "tasks.stage.warm", address[1:], runner]
            nothing = subprocess.DEVNULL
            host = subprocess.Popen(
                command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
            )
        elif host.poll() not in (None, 0):
            return None
        time.sleep(SECONDS_BETWEEN_TRIES)
    return None


def _ours(connection: socket.socket) -> bool:
    """Whether the same user is at the other end: an address of this kind is open to everybody."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", found)[1] == os.getuid())


def serve(address: str, runner: int) -> tuple[Request, socket.socket] | None:
    """Fork a child for each request until the runner and all children are gone.

    Returns None then, and in every child what it shall become, and its connection to whoever asked.
    """
    watched = os.pidfd_open(runner)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(address)
    except OSError:
        return None  # another host was faster
    listener.listen()
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    later = iter(LATER)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(watched, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}
    serving = True
    while serving or children:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                asked = _asked(connection)
                if asked is None:
                    connection.close()
                    continue
                request, descriptors = asked
                child = os.fork()
                if child == 0:
                    listener.close()
                    for number, descriptor in zip((1, 2), descriptors, strict=True):
                        os.dup2(descriptor, number)
                    return request, connection
                for descriptor in descriptors:
                    os.close(descriptor)
                connection.send(str(child).encode())
                ending = os.pidfd_open(child)
                children[ending] = child, connection
                selector.register(ending, selectors.EVENT_READ)
                for library in later:
                    with contextlib.suppress(Exception):  # a stage that needs it will say what is wrong
                        importlib.import_module(library)
                gc.freeze()
            elif key.fd in children:
                selector.unregister(key.fd)
                child, connection = children.pop(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                os.close(key.fd)
                with connection, contextlib.suppress(OSError):
                    connection.send(str(code).encode())
            else:
                selector.unregister(watched)
                serving = False
    return None


def _asked(connection: socket.socket) -> tuple[Request, list[int]] | None:
    if not _ours(connection):
        return None
    message, descriptors, _, _ = socket.recv_fds(connection, LARGEST_MESSAGE, 2)
    request = Request(**json.loads(message)) if message else None
    if request is None or _interpreter(request.environment) != _interpreter(os.environ):
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    return request, descriptors


def _interpreter(environment: Mapping[str, str]) -> dict[str, str]:
    """What Python itself reads of an environment when it starts."""
    return {name: value for name, value in environment.items() if name.startswith("PYTHON")}


def become(request: Request, connection: socket.socket) -> None:
    """Run the module as if this process had been started for it; whoever asked takes it along."""

    def watch() -> None:
        connection.recv(1)  # comes back when the other end is closed
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="asked", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started the host had blocked some
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.path[0] = request.folder
    del sys.argv[1:]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tasks"]:
        del sys.modules[name]  # its code may have changed since the host was started
    importlib.invalidate_caches()
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    forked = serve(f"\0{sys.argv[1]}", int(sys.argv[2]))
    if forked is not None:
        become(*forked)
