"""Writes what happens in a run to a local spool; a process of its own sends it on to MLflow.

Every event is one line of `.work/spool/RUN/events.jsonl`. The stage never speaks to the tracking server and
never imports its client, so a server that is slow, down or dying changes nothing: the spool is sent later. The
sender is `python -m tasks.stage.tracking`; it follows the file, and marks the run KILLED when its writer dies.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tasks.stage.errors import one_line, say
from tasks.stage.files import write_json
from tasks.stage.lock import Lock
from tasks.stage.memory import peak_memory
from tasks.stage.secrets import redacted

SPOOL = Path(".work") / "spool"
SECONDS_TO_SEND = 60  # after the end of a run, before what is left is kept for later
SECONDS_BETWEEN_SAMPLES = 5.0
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Recorder:
    """The record of one run; a Track. `id` names the run before a server has given it a number.

    Nothing here raises: when the disk is full, one line says that recording has stopped.
    """

    def __init__(
        self, name: str, tags: Mapping[str, str], parent: str | None = None, spool: Path = SPOOL
    ) -> None:
        self._open(spool / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{uuid.uuid4().hex[:12]}", new=True)
        self._write({"kind": "start", "name": name, "tags": redacted(dict(tags)), "parent": parent})

    @classmethod
    def joining(cls, folder: Path) -> "Recorder":
        """Adds to the record in `folder`, which another process has begun, handed over, and will end."""
        recorder = cls.__new__(cls)
        recorder._open(folder, new=False)
        return recorder

    def _open(self, folder: Path, *, new: bool) -> None:
        self.id, self.folder = folder.name, folder
        self._lock = threading.Lock()
        self._alive = Lock(self.folder / "writer")
        self._started = time.monotonic()
        self._sampled = 0.0
        self._step = 0
        self._handed_over = False
        self._events: int | None = None
        self._sender: subprocess.Popen[str] | None = None
        try:
            if new:
                (self.folder / "files").mkdir(parents=True)
                self._alive.acquire()
            self._events = os.open(self.folder / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self._give_up(error)

    def start_sending(self) -> None:
        """Start the process that sends the events on while they come in."""
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
        command = [sys.executable, "-m", "tasks.stage.tracking", str(self.folder), str(os.getpid())]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        # a stop request to the whole group is meant for us; the sender inherits the mask and sees how we end
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._sender = subprocess.Popen(command, env=environment, stdin=nothing, stdout=pipe, text=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def params(self, values: Mapping[str, Any]) -> None:
        self._write({"kind": "params", "values": flat(redacted(dict(values)))})

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        if step is not None:
            self._step = step
        self._points(values, self._step)  # a final value comes last in the curve of its name

    def tags(self, values: Mapping[str, str]) -> None:
        self._write({"kind": "tags", "values": redacted(dict(values))})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(rows[0]) if rows else []
        split = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
        target = f"tables/{name}.json"
        self._keep(target, lambda file: write_json(file, split))
        self._write({"kind": "table", "file": target})

    def figure(self, name: str, path: Path) -> None:
        self._add(path, f"figures/{name}{path.suffix}")

    def artifact(self, path: Path) -> None:
        self._add(path, path.name)

    def dataset(self, name: str, path: Path, digest: str, rows: int) -> None:
        event = {"name": name, "path": path.as_posix(), "digest": digest, "rows": rows}
        self._write({"kind": "dataset", **redacted(event)})

    def link(self, stage: str, fingerprint: str) -> None:
        """Tag this run with the run that made the outputs of `stage`."""
        self._write({"kind": "link", "stage": stage, "fingerprint": fingerprint})

    def tag_run(self, run: str, values: Mapping[str, str]) -> None:
        """Tag another run, named by its recording's id."""
        self._write({"kind": "tag_run", "run": run, "values": redacted(dict(values))})

    def hand_over(self) -> Path:
        """Leave the measuring of memory to the process that will join the record in the folder returned."""
        self._handed_over = True
        return self.folder

    def leave(self, values: Mapping[str, float]) -> None:
        """Record the last numbers of a process that joined."""
        self.metrics({**values, **_peaks()})

    def sample(self) -> None:
        """Record memory and processor use, at most every five seconds."""
        now = time.monotonic()
        if not self._handed_over and now - self._sampled >= SECONDS_BETWEEN_SAMPLES:
            self._sampled = now
            self._points(_use_now(), round(now - self._started))

    def end(self, status: Status) -> str | None:
        """End the run, wait until it is sent, and give its MLflow id: None when it is kept for later."""
        peaks = {} if self._handed_over else _peaks()
        self.metrics({"system/seconds": time.monotonic() - self._started, **peaks})
        self._write({"kind": "end", "status": status})
        complete = self._events is not None
        if self._events is not None:
            os.close(self._events)
            self._events = None
        run_id = self._wait(self._sender, complete) if self._sender is not None else None
        self._alive.release()
        return run_id

    def _wait(self, sender: subprocess.Popen[str], complete: bool) -> str | None:
        if not complete:  # it would wait for an end that could not be written
            sender.kill()
        try:
            answer, _ = sender.communicate(timeout=SECONDS_TO_SEND)
        except subprocess.TimeoutExpired:
            sender.kill()
            sender.communicate()
            say(f"warning: sending the run takes too long: `lifecycle upload` sends it from {self.folder}")
            return None
        return answer.strip() or None

    def _points(self, values: Mapping[str, float], step: int) -> None:
        numbers = {metric_name(name): float(value) for name, value in values.items()}
        self._write({"kind": "metrics", "values": numbers, "step": step})

    def _add(self, path: Path, target: str) -> None:
        if path.is_dir():
            for file in sorted(inner for inner in path.rglob("*") if inner.is_file()):
                self._add(file, f"{target}/{file.relative_to(path).as_posix()}")
            return
        self._keep(target, lambda file: shutil.copyfile(path, file))
        self._write({"kind": "artifact", "file": target})

    def _keep(self, target: str, write: Any) -> None:
        """Put a file into the spool under its final name."""
        file = self.folder / "files" / target
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file)
        except OSError as error:
            say(f"warning: {target} is not recorded: {one_line(error)}")

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps({**event, "time": time.time_ns() // 1_000_000}, default=str) + "\n"
        with self._lock:
            if self._events is None:
                return
            try:
                os.write(self._events, line.encode())
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        say(f"warning: nothing more is recorded about this run: {one_line(error)}")
        self._events = None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names: {"a": {"b": 1}} → {"a.b": 1}."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}."))
        else:
            result[f"{prefix}{name}"] = value
    return result


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among nested values, flat."""
    return {
        name: float(value)
        for name, value in flat(values).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def metric_name(name: str) -> str:
    """`name` with what MLflow does not allow in it replaced by an underscore."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def _use_now() -> dict[str, float]:
    import psutil

    process = psutil.Process()
    return {
        "system/memory_megabytes": process.memory_info().rss / 1e6,
        "system/cpu_percent": psutil.cpu_percent(),
    }


def _peaks() -> dict[str, float]:
    peaks = {"system/peak_memory_megabytes": peak_memory() / 1e6}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peaks["system/peak_gpu_memory_megabytes"] = torch.cuda.max_memory_allocated() / 1e6
    return peaks
