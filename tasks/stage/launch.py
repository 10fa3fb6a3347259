"""A stage that trains in several processes: `accelerate launch` starts them, the stage speaks for them.

What there is one of stays with the stage itself, the process that DVC started: the lock, the record,
metrics/STAGE.json, the exit code. The processes run the body, each in its `Place`; the first one writes what
the body writes. A folder that lives as long as they do (LIFECYCLE_JOB names it) tells them what to do, and each
leaves there how it ended. On machines of rank 1 and more (LIFECYCLE_MACHINE_RANK) the same command starts the
processes of that machine, and neither locks, records nor writes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.stage import warm
from tasks.stage.context import Context
from tasks.stage.errors import ParamsError, ProcessEnded, UserError
from tasks.stage.files import write_json
from tasks.stage.lock import Lock, holder
from tasks.stage.params import Compute, read_yaml
from tasks.stage.place import Place

CONFIGURATIONS = Path(__file__).parents[2] / "infra" / "accelerate"
JOB = "LIFECYCLE_JOB"
MACHINE_RANK = "LIFECYCLE_MACHINE_RANK"
LOST = 137  # what a process killed by SIGKILL ends with: to a runner it is a crash, which may pass
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_WITHOUT_NEWS = 24 * 60 * 60  # of another process: one that dies is noticed by other means


@dataclass(frozen=True)
class Ending:
    """How a process ended; `trace` is set where the fault is ours."""

    code: int
    message: str
    trace: str
    metrics: Mapping[str, Any]
    time: float


@dataclass(frozen=True)
class Job:
    """What the processes of a stage are told; `folder` is where they leave how they ended."""

    folder: Path
    work: Path
    recording: Path | None
    threads: int
    arguments: list[str]  # of `accelerate launch`

    def write(self) -> None:
        write_json(self.folder / "job.json", {name: _plain(value) for name, value in asdict(self).items()})

    def has_owner(self) -> bool:
        """Whether the stage that started the job lives."""
        return holder(self.folder / "owner") is not None

    def end(self, rank: int, ending: Ending) -> None:
        write_json(self.folder / f"{rank}.json", asdict(ending))


def job() -> Job | None:
    """The job that this process was started for, or None."""
    if JOB not in os.environ:
        return None
    folder = Path(os.environ[JOB])
    found = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    recording = None if found["recording"] is None else Path(found["recording"])
    return Job(folder, Path(found["work"]), recording, found["threads"], found["arguments"])


def asked_for(compute: Compute) -> bool:
    """Whether params.yaml wants a stage that trains to be launched."""
    return compute.processes > 1 or compute.accelerate is not None


def machine_rank() -> int:
    """Which of the machines this is."""
    return int(os.environ.get(MACHINE_RANK, "0"))


def run_body(context: Context, recording: Path | None) -> Mapping[str, Any]:
    """Run the body of the stage that this process is in processes of its own; return the metrics of the first.

    Raises ParamsError when the configuration does not fit, UserError when DeepSpeed is missing, ProcessEnded
    once a process has ended otherwise than well (then all are gone), and Interrupted when asked to stop.
    """
    program = sys.modules["__main__"].__spec__
    assert program is not None  # `python -m tasks.STAGE`
    arguments, threads = launch_arguments(program.name, context.compute)
    with tempfile.TemporaryDirectory(prefix="lifecycle-") as name:
        folder = Path(name)
        owner = Lock(folder / "owner")
        owner.acquire()
        Job(folder, context.work.absolute(), recording, threads, arguments).write()
        environment = {**os.environ, JOB: str(folder)}
        warm.offer(environment)
        launcher = subprocess.Popen(
            [sys.executable, "-m", "tasks.stage.launcher"],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is meant for us, and passed on once
        )
        try:
            _await(launcher, context)
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
            owner.release()  # what still lives of them ends itself
        return _outcome(folder, context.compute.processes, launcher.returncode)


def launch_arguments(module: str, compute: Compute) -> tuple[list[str], int]:
    """The arguments of `accelerate launch` that start the module, and the CPU threads of each process.

    Raises ParamsError and UserError.
    """
    path = configuration(compute.accelerate or "ddp")
    settings = read_yaml(path)
    _check(settings, compute)
    machines = int(settings.get("num_machines") or 1)
    if compute.processes % machines:
        raise ParamsError(
            f"compute.processes: {compute.processes} cannot be shared evenly by {machines} machines"
        )
    threads = compute.threads or max(1, (os.cpu_count() or 1) * machines // compute.processes)
    options: dict[str, Any] = {
        "--config_file": path,
        "--num_processes": compute.processes,
        "--num_cpu_threads_per_process": threads,
    }
    if machines > 1:
        options["--machine_rank"] = os.environ.get(MACHINE_RANK, settings.get("machine_rank", 0))
    elif settings.get("main_process_port") is None:
        options["--main_process_port"] = 0  # any that is free
    return [*(str(word) for option in options.items() for word in option), "--module", module], threads


def configuration(name: str) -> Path:
    """The file of a configuration in infra/accelerate/, or at a path. Raises ParamsError when there is none."""
    for path in (CONFIGURATIONS / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path.absolute()
    known = ", ".join(sorted(path.stem for path in CONFIGURATIONS.glob("*.yaml")))
    raise ParamsError(f"compute.accelerate: no configuration {name}; name {known}, or the path of a file")


def take_place(compute: Compute, threads: int) -> Place:
    """Join the other processes that the launcher started (imports torch).

    Raises ParamsError when there are more processes than GPUs.
    """
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    torch.set_num_threads(threads)
    on_cpu = compute.device == "cpu" or not torch.cuda.is_available()
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if not on_cpu and here > torch.cuda.device_count():
        raise ParamsError(
            f"compute.processes asks for {here} GPUs on this machine, which has {torch.cuda.device_count()}"
        )
    os.environ["ACCELERATE_USE_CPU"] = str(on_cpu).lower()
    state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=SECONDS_WITHOUT_NEWS))
    in_parts = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ)
    if state.distributed_type in ("MULTI_CPU", "NO") and in_parts:
        raise ParamsError(f"compute.accelerate: {compute.accelerate} is for GPUs; on a CPU name ddp")
    return Place(state.process_index, state.num_processes)


def leave_place() -> None:
    """Close the connections to the other processes."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _check(settings: Mapping[str, Any], compute: Compute) -> None:
    from importlib.util import find_spec

    if settings.get("distributed_type") == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise UserError(
            f"compute.accelerate is {compute.accelerate}, which needs deepspeed: pip install deepspeed"
        )


def _await(launcher: "subprocess.Popen[bytes]", context: Context) -> None:
    asked = False
    with context.save_on_stop():
        while launcher.poll() is None:
            if context.stopping and not asked:
                launcher.terminate()
                asked = True
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _outcome(folder: Path, processes: int, code: int) -> Mapping[str, Any]:
    """The metrics of the first process. The fault is that of one that ended without a word, or of the first."""
    if code == 0:
        first = _ending(folder, 0)
        return {} if first is None else first.metrics
    failed: dict[str, int] = {}
    if (found := folder / "failed.json").is_file():
        failed = json.loads(found.read_text(encoding="utf-8"))
    endings = {int(rank): _ending(folder, int(rank)) for rank in failed}
    for rank, code in sorted(
        ((int(rank), code) for rank, code in failed.items()), key=lambda each: each[1] >= 0
    ):
        if endings[rank] is None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code} without a word"
            message = f"process {rank} of {processes} {how}: run again, and it goes on from the last checkpoint"
            raise ProcessEnded(LOST, message)
    told = [ending for ending in endings.values() if ending is not None]
    if not told:
        raise ProcessEnded(LOST, f"accelerate launch ended with {code} before a process did: see its output")
    cause = min(told, key=lambda ending: ending.time)
    raise ProcessEnded(cause.code, cause.trace or cause.message)


def _ending(folder: Path, rank: int) -> Ending | None:
    file = folder / f"{rank}.json"
    return Ending(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
