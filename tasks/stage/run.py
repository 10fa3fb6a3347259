"""The entry point of a stage: `python -m tasks.STAGE` reads params, takes the lock, records, runs, exits.

What a runner may set in the environment, all optional: LIFECYCLE_PARENT_RUN_ID (the recording or MLflow run of
the pipeline), LIFECYCLE_FLOW_RUN_ID (Prefect's id), LIFECYCLE_ATTEMPT (1, 2, ...), LIFECYCLE_TRACKING=off,
LIFECYCLE_WARM (tasks/stage/warm.py), LIFECYCLE_MACHINE_RANK (tasks/stage/launch.py).
"""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tasks.stage import checkpoints, launch, starter, warm
from tasks.stage.context import SECONDS_TO_SAVE, Context, Stop
from tasks.stage.errors import Helped, Interrupted, ProcessEnded, TryAgain, exit_code, one_line, say, told
from tasks.stage.files import write_json
from tasks.stage.fingerprint import fingerprint
from tasks.stage.lock import Lock, holder
from tasks.stage.params import (
    GRAPH_FILE,
    PARAMS_FILE,
    Section,
    Shared,
    check_sections,
    read_section,
    read_shared,
    read_yaml,
    stages_of,
)
from tasks.stage.place import ALONE, Place
from tasks.stage.recorder import Recorder, Status, numbers
from tasks.stage.track import NullTrack

WORK = Path(".work")
AnyParams = TypeVar("AnyParams", bound=Section)
Body = Callable[[AnyParams, Context], Mapping[str, Any]]


def run_stage(
    name: str, params_class: type[AnyParams], body: Body[AnyParams], *, torch: bool = True, trains: bool = False
) -> None:
    """Run the stage `name` in the current folder, write metrics/NAME.json, and exit with the code that fits.

    `body` gets the validated section of params.yaml and a Context, and returns the metrics. With `torch` false
    the stage computes no tensors and torch is not imported. One that `trains` runs its body in as many
    processes as params.yaml says. However it ends, `.work/NAME/last.json` says how.
    """
    code = warm.stand_in() if torch else None
    if code is None:
        execution, job = _Execution(name, launch.machine_rank() == 0), launch.job()
        if job is None:
            code = execution.run(params_class, body, torch, trains)
        else:
            code = execution.take_part(job, params_class, body)
    sys.exit(code)


@dataclass
class _Execution:
    """One start of a stage, from the lock to the exit record."""

    name: str
    first: bool = True  # of the machines that the stage runs on
    fingerprint: str | None = None
    recorder: Recorder | None = None

    def run(self, params_class: type[AnyParams], body: Body[AnyParams], torch: bool, trains: bool) -> int:
        started = _now()
        stop = Stop()
        stop.listen()
        lock = Lock(WORK / self.name / "lock")
        code, message = 0, ""
        try:
            lock.path.parent.mkdir(parents=True, exist_ok=True)
            if self.first and not lock.acquire():
                raise TryAgain(f"{self.name} is already running here as process {holder(lock.path)}")
            links = starter.links_to_starter()
            starter.watch(lambda: starter.intact(links), lambda: _leave(stop), self._sample)
            self._work(params_class, body, torch, trains, stop)
        except (Exception, Interrupted) as error:
            stop.ignore()
            code, message = exit_code(error), told(error)
            if code != 1:
                say(f"{self.name}: {message}")
            elif isinstance(error, ProcessEnded):
                say(str(error))  # its traceback
            else:
                traceback.print_exc()
        stop.ignore()
        if self.first:
            self._end(code, message, started)
        return code

    def take_part(self, job: launch.Job, params_class: type[AnyParams], body: Body[AnyParams]) -> int:
        """As one of the processes that the stage has started: run the body, and leave word how it ended.

        Only the first of them records, shows progress and says what there is to be said.
        """
        stop = Stop()
        stop.listen()
        starter.watch(job.has_owner, lambda: os.kill(os.getpid(), signal.SIGKILL), self._sample)
        rank = int(os.environ["RANK"])
        if rank > 0:
            _speak_into(WORK / self.name / f"process-{rank}.log")
        elif job.recording is not None:
            self.recorder = Recorder.joining(job.recording)
        code, message, trace = 0, "", ""
        metrics: Mapping[str, Any] = {}
        try:
            from tasks.stage.determinism import prepare_torch

            shared, params = self._params(params_class)
            prepare_torch(shared.seed, shared.compute)
            place = launch.take_place(shared.compute, job.threads)
            metrics = body(params, self._context(shared, job.work, stop, place))
            if self.recorder is not None:
                self.recorder.leave(numbers(metrics))
        except Helped:
            pass
        except (Exception, Interrupted) as error:
            stop.ignore()  # the launcher asks all to stop once one has failed
            code, message = exit_code(error), told(error)
            trace = traceback.format_exc() if code == 1 else ""
        stop.ignore()
        job.end(rank, launch.Ending(code, message, trace, metrics, time.time()))
        if code == 0:
            launch.leave_place()
        return code

    def _work(
        self, params_class: type[AnyParams], body: Body[AnyParams], torch: bool, trains: bool, stop: Stop
    ) -> None:
        shared, params = self._params(params_class)
        self.fingerprint = fingerprint(self.name)
        if os.environ.get("LIFECYCLE_TRACKING") != "off" and self.first:
            self.recorder = Recorder(self.name, self._tags(), os.environ.get("LIFECYCLE_PARENT_RUN_ID"))
            self.recorder.start_sending()
            self.recorder.params({**shared.model_dump(mode="json"), **params.model_dump(mode="json")})
        work = WORK / self.name / self.fingerprint
        work.mkdir(parents=True, exist_ok=True)
        context = self._context(shared, work, stop, ALONE)
        if trains and launch.asked_for(shared.compute):
            metrics = launch.run_body(context, self.recorder.hand_over() if self.recorder is not None else None)
        else:
            if torch:
                from tasks.stage.determinism import prepare_torch

                prepare_torch(shared.seed, shared.compute)
            metrics = body(params, context)
            self._record(metrics)
        if self.first:
            write_json(Path("metrics") / f"{self.name}.json", metrics)
            checkpoints.remove_others(work)

    def _params(self, params_class: type[AnyParams]) -> tuple[Shared, AnyParams]:
        data = read_yaml(PARAMS_FILE)
        check_sections(data, stages_of(read_yaml(GRAPH_FILE)))
        return read_shared(data), read_section(data, self.name, params_class)

    def _context(self, shared: Shared, work: Path, stop: Stop, place: Place) -> Context:
        return Context(
            name=self.name,
            seed=shared.seed,
            compute=shared.compute,
            work=work,
            track=self.recorder or NullTrack(),
            stop=stop,
            progress_file=WORK / self.name / "progress.json" if place.rank == 0 else None,
            place=place,
        )

    def _record(self, metrics: Mapping[str, Any]) -> None:
        if self.recorder is not None:
            self.recorder.metrics(numbers(metrics))

    def _end(self, code: int, message: str, started: str) -> None:
        status: Status = "FINISHED" if code == 0 else "KILLED" if code > 128 else "FAILED"
        record = {
            "stage": self.name,
            "exit_code": code,
            "message": message,
            "fingerprint": self.fingerprint,
            "recording": self.recorder.id if self.recorder is not None else None,
            "mlflow_run_id": self.recorder.end(status) if self.recorder is not None else None,
            "attempt": _attempt(),
            "started": started,
            "ended": _now(),
        }
        try:
            write_json(WORK / self.name / "last.json", record)
        except OSError as error:  # how the stage ended says its exit code, too
            say(f"warning: {self.name}: no exit record: {one_line(error)}")

    def _tags(self) -> dict[str, str]:
        tags = {"dvc.stage": self.name, "dvc.fingerprint": self.fingerprint or "", "attempt": str(_attempt())}
        if flow := os.environ.get("LIFECYCLE_FLOW_RUN_ID"):
            tags["prefect.flow_run_id"] = flow
        return tags | git_tags()

    def _sample(self) -> None:
        if self.recorder is not None:
            self.recorder.sample()


def git_tags() -> dict[str, str]:
    """The commit, and whether the code or params differ from it; nothing outside a git repository.

    What the pipeline itself writes (dvc.lock, metrics, reports) does not count as a difference.
    """
    written = (":!dvc.lock", ":!metrics", ":!reports")
    changes = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *written]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run(changes, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git.commit": commit.strip(), "git.dirty": str(bool(dirty.strip())).lower()}


def _speak_into(file: Path) -> None:
    """Send what this process writes to stdout and stderr to a file of its own, made anew."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _leave(stop: Stop) -> None:
    """Whoever started the stage is gone: stop as if asked to, unless we were, and in any case."""
    if stop.signal_number is None:
        say("whoever started this stage is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * SECONDS_TO_SAVE)
    os._exit(128 + signal.SIGTERM)


def _attempt() -> int:
    return int(os.environ.get("LIFECYCLE_ATTEMPT", "1"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
