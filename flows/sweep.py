"""Many variants of the pipeline: each point of a grid, or trial of a search, in a git work tree of its own.

    .work/sweeps/NAME/sweep.json     what the sweep is; `base` is a commit of the workspace as it was
    .work/sweeps/NAME/points/N.json  what became of a point; `commit` has its params, dvc.lock, metrics, reports
    .work/sweeps/NAME/logs/N.log     what its run printed
    .work/sweeps/NAME/N-VALUES/      its work tree, until it is done

Work trees share DVC's cache and the MLflow store, so a stage that is equal in two points runs in one of them
and is restored in the other. A point is done when its record says so: whatever ended the sweep before, the same
command goes on with the rest.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from flows import child, grid, params_file, pipeline, point, processes, server, snapshot
from flows.display import Display, read_state_line
from flows.point import Point
from flows.processes import Stopped
from flows.workspace import child_environment
from tasks.planning.hardware import has_gpu
from tasks.stage import tracking, warm
from tasks.stage.errors import ParamsError, TryAgain, UserError, exit_code, one_line, say
from tasks.stage.files import write_json
from tasks.stage.lock import Lock, holder
from tasks.stage.params import PARAMS_FILE

SWEEPS = Path(".work") / "sweeps"
REFERENCES = "refs/lifecycle/sweeps"
READY = Path(".work") / "ready"
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_END = 90.0  # a stage saves its checkpoint, its runs in MLflow are ended
INTERRUPTED = 130
State = Literal["waiting", "running", "done", "failed", "stopped", "pruned"]


@dataclass(frozen=True)
class Sweep:
    """What is tried, on which state of the workspace (`base`, a commit).

    A grid has `settings` alone; a search has `search`, an `objective`, perhaps `early` metrics, and so many
    `trials`.
    """

    name: str
    base: str
    presets: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    objective: str = ""
    early: tuple[str, ...] = ()
    trials: int = 0


@dataclass
class Record:
    """One point and what became of it. `commit` holds its results once it is done; `stages` says how each
    of its stages ended; `value` is a search's objective."""

    number: int
    name: str
    settings: dict[str, Any]
    state: State = "waiting"
    code: int = 0
    message: str = ""
    seconds: float = 0.0
    commit: str | None = None
    stages: dict[str, str] = field(default_factory=dict)
    value: float | None = None


class Plan(Protocol):
    """Decides which points there are, and which of them is next."""

    def take(self, running: Collection[Record]) -> Record | None:
        """The next point to run beside `running`; None when there is none now."""

    def early_stages(self) -> Sequence[str]:
        """The stages to run alone first, one after the other."""

    def worth_going_on(self, record: Record, step: int, folder: Path) -> bool:
        """Whether a point is to run on after its `step`-th early stage (0, 1, ...)."""

    def settled(self, record: Record, folder: Path) -> None:
        """A point has ended; its work tree is still there."""


class Grid:
    """All points of a grid, those that are not done yet."""

    def __init__(self, records: Iterable[Record], order: Sequence[str]) -> None:
        self._waiting = [record for record in records if record.state != "done"]
        self._order = order

    def take(self, running: Collection[Record]) -> Record | None:
        """Beside others, the point that shares the fewest stages with them: it would wait for those."""
        if not self._waiting:
            return None
        chosen = min(
            self._waiting,
            key=lambda record: max((shared(record, other, self._order) for other in running), default=0),
        )
        self._waiting.remove(chosen)
        return chosen

    def early_stages(self) -> Sequence[str]:
        return ()

    def worth_going_on(self, record: Record, step: int, folder: Path) -> bool:
        return True

    def settled(self, record: Record, folder: Path) -> None:
        pass


def shared(one: Record, other: Record, order: Sequence[str]) -> int:
    """How many stages, from the first of the graph on, have the same settings in two points."""
    for number, stage in enumerate(order):
        if _of_stage(one.settings, stage) != _of_stage(other.settings, stage):
            return number
    return len(order)


def begin(root: Path, definition: Sweep, named: bool) -> Sweep:
    """Write down a new sweep of the workspace as it is, or find the one that was begun by the same command.

    The name of `definition` is used when `named`, else one is made from what it tries. Raises ParamsError when
    a point has wrong params, UserError when the name belongs to another sweep.
    """
    if named and not re.fullmatch(NAME, definition.name):
        raise UserError(f"--name {definition.name}: letters, digits, - and _ only")
    definition = replace(definition, base=snapshot.take(root, "workspace of a sweep"))
    same = _identity(root, definition)
    name = definition.name if named else f"{definition.name}-{same[:6]}"
    sweep = replace(definition, name=name)
    if (place(root, name) / "sweep.json").is_file():
        known = load(root, name)
        if _identity(root, known) != same:
            raise UserError(
                f"--name {name}: that sweep tries something else, or was begun when the workspace was another: "
                f"choose another name, or `lifecycle sweep --continue {name}`"
            )
        sweep = replace(known, trials=max(known.trials, sweep.trials))
    records = [] if sweep.search else _grid_records(root, sweep)
    snapshot.name_it(root, f"{REFERENCES}/{name}/base", sweep.base)
    for record in records:
        if not _record_path(root, name, record.number).is_file():
            keep(root, name, record)
    write_json(place(root, name) / "sweep.json", asdict(sweep))
    return sweep


def check_params(root: Path, sweep: Sweep, settings: Mapping[str, Any]) -> None:
    """Raise ParamsError when the workspace as it is would have wrong params with these settings."""
    _params(root, (root / PARAMS_FILE).read_text(encoding="utf-8"), sweep, settings)


def seed(root: Path, sweep: Sweep) -> int:
    """`seed` of the params that the sweep started from."""
    from ruamel.yaml import YAML

    text = snapshot.read(root, sweep.base, str(PARAMS_FILE)) or ""
    return int(YAML(typ="safe", pure=True).load(text)["seed"])


def load(root: Path, name: str) -> Sweep:
    """The sweep NAME. Raises UserError when there is none."""
    path = place(root, name) / "sweep.json"
    if not re.fullmatch(NAME, name) or not path.is_file():
        raise UserError(f"no sweep {name}; there are: {', '.join(names(root)) or 'none'}")
    found = json.loads(path.read_text(encoding="utf-8"))
    listed: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in found.items()
    }
    return Sweep(**listed)


def names(root: Path) -> list[str]:
    """The sweeps that were begun here."""
    return sorted(path.parent.name for path in (root / SWEEPS).glob("*/sweep.json"))


def records(root: Path, name: str) -> list[Record]:
    """The points of a sweep, by number."""
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in (place(root, name) / "points").glob("*.json")
    ]
    return sorted((Record(**each) for each in found), key=lambda record: record.number)


def find(root: Path, name: str, wanted: str) -> Record:
    """The point of a sweep by its number or its name. Raises UserError when there is none."""
    found = records(root, load(root, name).name)
    for record in found:
        if wanted in (str(record.number), record.name):
            return record
    raise UserError(f"sweep {name} has no point {wanted}; it has {', '.join(record.name for record in found)}")


def keep(root: Path, name: str, record: Record) -> None:
    """Write down what became of a point."""
    write_json(_record_path(root, name, record.number), asdict(record))


def remove(root: Path, name: str) -> None:
    """Forget a sweep: its work trees, records and commits; what DVC keeps stays. Raises UserError, TryAgain."""
    sweep = load(root, name)
    with locked(root, sweep):
        for record in records(root, name):
            snapshot.remove_tree(root, place(root, name) / record.name)
        snapshot.forget(root, f"{REFERENCES}/{name}")
        (place(root, name) / "sweep.json").unlink()
    snapshot.remove_tree(root, place(root, name))


def place(root: Path, name: str) -> Path:
    """The folder of a sweep."""
    return root / SWEEPS / name


def log_path(root: Path, name: str, record: Record) -> Path:
    """What the run of a point prints."""
    return place(root, name) / "logs" / f"{record.number}.log"


@contextmanager
def locked(root: Path, sweep: Sweep) -> Iterator[None]:
    """Keep others from working on the sweep while the block runs. Raises TryAgain when somebody does."""
    lock = Lock(place(root, sweep.name) / "lock")
    if not lock.acquire():
        raise TryAgain(f"sweep {sweep.name} runs already as process {holder(lock.path)}")
    try:
        yield
    finally:
        lock.release()


class Work:
    """The points of a sweep being run, `jobs` at a time, each by `lifecycle run` in its own work tree.

    `stop` ends them: their stages save checkpoints. With `keep_trees` the work trees of points that are done
    stay.
    """

    def __init__(self, root: Path, sweep: Sweep, plan: Plan, jobs: int, keep_trees: bool) -> None:
        self.root, self.sweep, self.jobs = root, sweep, jobs
        self.stop = threading.Event()
        self.running: dict[Future[None], Record] = {}
        self._plan, self._keep_trees = plan, keep_trees
        self._git = threading.Lock()
        self._environment: dict[str, str] = {}

    def begin(self) -> None:
        """Make ready what all points share: the MLflow store, the folders for logs and locks, and the process
        that their stages are forked from.
        """
        for name in ("logs", "locks"):
            (place(self.root, self.sweep.name) / name).mkdir(exist_ok=True)
        extra = {} if has_gpu() else {warm.VARIABLE: str(os.getpid())}
        if os.environ.get("LIFECYCLE_TRACKING") != "off":
            extra["MLFLOW_TRACKING_URI"] = tracking.prepare_store(self.root)
        self._environment = child_environment(extra)

    def recorded_at(self, url: str) -> None:
        """The Prefect server that records the runs."""
        self._environment["PREFECT_API_URL"] = url

    def go_on(self, threads: ThreadPoolExecutor) -> bool:
        """Start what can start and see what has ended; whether it is worth coming again."""
        while len(self.running) < self.jobs and not self.stop.is_set():
            record = self._plan.take(list(self.running.values()))
            if record is None:
                break
            record.state, record.code, record.message = "running", 0, ""
            self.running[threads.submit(self._settle, record)] = record
        done, _ = wait(self.running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
        for future in done:
            del self.running[future]
            future.result()
        return bool(self.running or done)

    def _settle(self, record: Record) -> None:
        """Run one point to its end, and write down what became of it, whatever goes wrong."""
        started = time.monotonic()
        folder = place(self.root, self.sweep.name) / record.name
        try:
            with self._git:
                _prepare(self.root, self.sweep, record, folder)
            self._run(record, folder)
            self._plan.settled(record, folder)
        except Stopped:
            record.state, record.code, record.message = "stopped", INTERRUPTED, "stopped"
        except Exception as error:
            record.state, record.code, record.message = "failed", exit_code(error), one_line(error)
        record.seconds += time.monotonic() - started
        keep(self.root, self.sweep.name, record)
        if record.state in ("done", "pruned") and not self._keep_trees:
            with self._git:
                snapshot.remove_tree(self.root, folder)

    def _run(self, record: Record, folder: Path) -> None:
        for step, stage in enumerate(self._plan.early_stages()):
            if not self._lifecycle(record, folder, [stage], early=True):
                return
            if not self._plan.worth_going_on(record, step, folder):
                record.state = "pruned"
                return
        if self._lifecycle(record, folder, self.sweep.stages, early=False):
            with self._git:
                commit = snapshot.take(folder, f"results of {self.sweep.name}/{record.name}")
                snapshot.name_it(self.root, _reference(self.sweep.name, record), commit)
            record.state, record.commit = "done", commit

    def _lifecycle(self, record: Record, folder: Path, stages: Sequence[str], early: bool) -> bool:
        """Run `lifecycle run` in the work tree of a point; whether it ended well."""
        point.write(folder, _point(self.root, self.sweep, record, early))
        log = log_path(self.root, self.sweep.name, record)
        code = processes.run(
            child.command("flows.cli", "run", "--wait", *(f"--stage={name}" for name in stages)),
            folder=folder,
            environment=self._environment,
            log=log,
            seconds=None,
            stop=self.stop,
            seconds_to_end=SECONDS_TO_END,
        )
        record.stages, told = read_log(log)
        if code == 0:
            return True
        record.state, record.code = "failed", code
        record.message = told or f"ended with {code}"
        return False


def carry_out(work: Work, show: Display) -> None:
    """Run the points that are missing until none is left; Ctrl-C stops them, a second one kills them.

    `show` is a display: it is refreshed several times a second.
    """
    work.begin()
    with ThreadPoolExecutor(work.jobs, thread_name_prefix="point") as threads, _prefect(work), show:
        while True:
            try:
                more = work.go_on(threads)
                show.refresh()
                if not more:
                    break
            except KeyboardInterrupt:
                if work.stop.is_set():
                    processes.kill_all()
                    raise
                work.stop.set()
                say("stopping: the running stages save their checkpoints (Ctrl-C again kills them)")


def code_of(found: Iterable[Record], stopped: bool) -> int:
    """The exit code of a sweep: 0 when no point failed, the first failure's if it is an answer, else 1."""
    if stopped:
        return INTERRUPTED
    failed = [record.code for record in found if record.state in ("failed", "stopped")]
    if not failed:
        return 0
    return failed[0] if failed[0] in {2, 3, pipeline.TRY_AGAIN} else 1


def read_log(log: Path) -> tuple[dict[str, str], str]:
    """(stage → how it ended, the reason of the first failure) from what `lifecycle run` has printed."""
    states: dict[str, str] = {}
    told = last = ""
    with suppress(FileNotFoundError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            last = line.strip() or last
            if (found := read_state_line(line)) is not None:
                stage, state, message = found
                states[stage] = state
                if state == "failed" and not told:
                    told = f"{stage}: {message}"
    return states, told or last[:200]


@contextmanager
def _prefect(work: Work) -> Iterator[None]:
    """One Prefect server for all points: the configured one, or one that lasts as long as the block."""
    url = server.configured(work.root)
    if url is not None:
        work.recorded_at(url)
        yield
        return
    with server.temporary(work.root) as (url, process):
        try:
            server.await_start(url, process, work.stop)
        except TryAgain as error:
            say(f"warning: {error}; each point starts a server of its own")
        else:
            work.recorded_at(url)
        yield


def _prepare(root: Path, sweep: Sweep, record: Record, folder: Path) -> None:
    """The work tree of a point, with its params and what the workspace had made; one that is there stays."""
    if (folder / READY).is_file():
        return
    before = snapshot.read(root, sweep.base, str(PARAMS_FILE)) or ""
    text = _params(root, before, sweep, record.settings)
    title = f"params of {sweep.name}/{record.name}"
    commit = snapshot.with_file(root, sweep.base, str(PARAMS_FILE), text, title)
    snapshot.name_it(root, _reference(sweep.name, record), commit)
    snapshot.add_tree(root, folder, commit)
    (folder / ".work").mkdir()
    (folder / ".work" / "dvc").mkdir(mode=0o700)
    (root / ".work" / "spool").mkdir(exist_ok=True)
    (folder / ".work" / "spool").symlink_to(root / ".work" / "spool")  # for `lifecycle upload`
    pipeline.share_cache(root, folder)
    pipeline.checkout(folder, "--allow-missing")
    (folder / READY).touch()


def _grid_records(root: Path, sweep: Sweep) -> list[Record]:
    found = grid.points(sweep.settings)
    differing = grid.differing(found)
    before = snapshot.read(root, sweep.base, str(PARAMS_FILE)) or ""
    if len(found) > 8:
        say(f"checking the params of {len(found)} points")
    for settings in found:
        _params(root, before, sweep, settings)
    return [
        Record(number, grid.name(number, settings, differing), settings)
        for number, settings in enumerate(found, start=1)
    ]


def _params(root: Path, before: str, sweep: Sweep, settings: Mapping[str, Any]) -> str:
    """params.yaml of a point. Raises ParamsError that names the point's settings."""
    lines = [grid.as_setting(key, value) for key, value in settings.items()]
    try:
        return params_file.changed_text(root, before, sweep.presets, lines)[0]
    except ParamsError as error:
        raise ParamsError(f"{', '.join(lines) or 'as it is'}: {error}") from None


def _point(root: Path, sweep: Sweep, record: Record, early: bool) -> Point:
    locks = str(place(root, sweep.name) / "locks")
    return Point(sweep.name, record.number, record.name, record.settings, locks, early)


def _identity(root: Path, sweep: Sweep) -> str:
    """What two equal commands on equal workspaces have in common."""
    parts = {**asdict(sweep), "name": "", "trials": 0, "base": snapshot.tree_of(root, sweep.base)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _reference(name: str, record: Record) -> str:
    return f"{REFERENCES}/{name}/{record.number}"


def _record_path(root: Path, name: str, number: int) -> Path:
    return place(root, name) / "points" / f"{number}.json"


def _of_stage(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The settings that a stage reads: those of its section, and those that all read."""
    return {
        key: value for key, value in settings.items() if key.partition(".")[0] in (stage, "seed", "compute")
    }
