"""The entry point of a stage: `python -m tasks.STAGE` reads params, takes the lock, records, runs, exits."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tasks.stage import starter
from tasks.stage.context import Context, Stop
from tasks.stage.errors import Interrupted, TryAgain, exit_code, one_line, say
from tasks.stage.files import write_json
from tasks.stage.fingerprint import fingerprint
from tasks.stage.lock import Lock, holder
from tasks.stage.params import (
    GRAPH_FILE,
    PARAMS_FILE,
    Section,
    check_sections,
    read_section,
    read_shared,
    read_yaml,
    stages_of,
)
from tasks.stage.track import NullTrack

WORK = Path(".work")
AnyParams = TypeVar("AnyParams", bound=Section)
Metrics = Mapping[str, Any]


def run_stage(
    name: str,
    params_class: type[AnyParams],
    body: Callable[[AnyParams, Context], Metrics],
    *,
    torch: bool = True,
) -> None:
    """Run the stage `name` in the current folder, write metrics/NAME.json, and exit with the code that fits.

    `body` gets the validated section of params.yaml and a Context, and returns the metrics. With `torch` false
    the stage computes no tensors and torch is not imported.
    """
    sys.exit(_run(name, params_class, body, torch))


def _run(
    name: str, params_class: type[AnyParams], body: Callable[[AnyParams, Context], Metrics], torch: bool
) -> int:
    stop = Stop()
    stop.listen()
    started = _now()
    lock = Lock(WORK / name / "lock")
    code, message, mark = 0, "", None
    try:
        if not lock.acquire():
            raise TryAgain(f"{name} is already running here as process {holder(lock.path)}")
        data = read_yaml(PARAMS_FILE)
        check_sections(data, stages_of(read_yaml(GRAPH_FILE)))
        shared, params = read_shared(data), read_section(data, name, params_class)
        starter.watch(starter.links_to_starter(), lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: None)
        mark = fingerprint(name)
        work = WORK / name / mark
        work.mkdir(parents=True, exist_ok=True)
        if torch:
            from tasks.stage.determinism import prepare_torch

            prepare_torch(shared.seed, shared.compute)
        context = Context(
            name=name,
            seed=shared.seed,
            compute=shared.compute,
            work=work,
            track=NullTrack(),
            stop=stop,
            progress_file=WORK / name / "progress.json",
        )
        metrics = body(params, context)
        write_json(Path("metrics") / f"{name}.json", metrics)
    except (Exception, Interrupted) as error:
        code, message = exit_code(error), one_line(error)
        if code == 1:
            traceback.print_exc()
        else:
            say(f"{name}: {message}")
    record = {
        "stage": name,
        "exit_code": code,
        "message": message,
        "fingerprint": mark,
        "mlflow_run_id": None,
        "attempt": int(os.environ.get("LIFECYCLE_ATTEMPT", "1")),
        "started": started,
        "ended": _now(),
    }
    write_json(WORK / name / "last.json", record)
    return code


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
