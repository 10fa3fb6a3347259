"""One run of the pipeline: what is to be done, what became of each stage, and how to stop it.

It knows nothing of Prefect: the flow decides when a stage's turn comes, and asks for it here.
"""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flows import links, pipeline, point, rankings
from flows.pipeline import Change, Stage, StageError
from flows.plan import refuse_what_cannot_fit
from flows.processes import Stopped
from flows.workspace import child_environment
from tasks.planning.hardware import has_gpu
from tasks.stage import tracking, warm
from tasks.stage.errors import UserError, exit_code, one_line, say
from tasks.stage.fingerprint import fingerprint
from tasks.stage.params import PARAMS_FILE, check_all, read_yaml
from tasks.stage.recorder import Recorder, Status

INTERRUPTED = 130
State = Literal["waiting", "running", "done", "restored", "cached", "failed", "stopped", "not run"]
STATES: dict[pipeline.How, State] = {"ran": "done", "restored": "restored", "unchanged": "cached"}
GOOD = set(STATES.values())


@dataclass
class Result:
    """What became of a stage: `code` and `message` of a failure, `seconds` of all its attempts together."""

    stage: str
    state: State = "waiting"
    seconds: float = 0.0
    attempts: int = 0
    code: int = 0
    message: str = ""
    log: Path | None = None


class Run:
    """The stages of one run in graph order, and a `Result` for each.

    `changed` says why a stage would run, `forced` names those that run in any case. At most `jobs` stages run
    side by side, and besides them one that asks for a GPU: without one it has the cores instead, which two
    stages would fight for. The stage that reads people's rankings first waits until there are as many as
    `wanted`; `pause` is told why, for as long as that takes, and gives a function that says whether to wait no
    longer.
    """

    def __init__(
        self,
        root: Path,
        stages: Mapping[str, Stage],
        changed: Mapping[str, tuple[Change, ...]],
        forced: frozenset[str],
        jobs: int,
        wanted: rankings.Wanted | None = None,
    ) -> None:
        self.root = root
        self.stages = stages
        self.changed = changed
        self.forced = forced
        self.point = point.read(root)
        self.results = {name: Result(name) for name in stages}
        self.stop = threading.Event()
        self.parent: Recorder | None = None
        self.flow_run_id = ""
        self.flow_run_url = ""
        self.wanted = wanted
        self.pause: Callable[[str], AbstractContextManager[Callable[[], bool]]] = _no_pause
        awaiting = {rankings.STAGE} if wanted else set()
        self.due = _with_descendants(stages, {*forced, *awaiting, *(name for name in stages if changed[name])})
        self._cpu = threading.BoundedSemaphore(jobs)
        self._gpu = threading.BoundedSemaphore(1)

    @property
    def title(self) -> str:
        """What runs, in a few words: the point of a sweep, or the stages that changed, and how many more may
        follow."""
        if self.point is not None:
            return self.point.title
        if not self.due:
            return "nothing to do"
        own = [name for name in self.stages if name in self.forced or self.changed[name]]
        shown = ", ".join(own[:3]) + (" …" if len(own) > 3 else "")
        later = len(self.due) - len(own)
        return shown + (f" +{later}" if later else "") + (" (forced)" if self.forced else "")

    @property
    def code(self) -> int:
        """The exit code: 0 when all is well, the first failing stage's if it is an answer, else 1."""
        if self.stop.is_set():
            return INTERRUPTED
        failed = [result.code for result in self.results.values() if result.state == "failed"]
        if not failed:
            return 0 if all(result.state in GOOD for result in self.results.values()) else 1
        return failed[0] if failed[0] in {2, 3, pipeline.TRY_AGAIN} else 1

    @property
    def mlflow_id(self) -> str | None:
        """The MLflow run of this run; None when it has none, or MLflow has not heard of it yet."""
        known = self.parent and self.parent.folder / "run_id"
        return known.read_text(encoding="ascii") if known and known.is_file() else None

    def record(self) -> None:
        """Start the run's own record in MLflow, parent of those of its stages."""
        if os.environ.get("LIFECYCLE_TRACKING") != "off":
            revision = commit(self.root)
            tags = {"git.commit": revision} if revision else {}
            if self.point is not None:
                tags |= self.point.tags
            self.parent = tracking.start_parent(self.title, tags)
            self.parent.params(read_yaml(self.root / PARAMS_FILE))

    def settle(self, name: str) -> Result:
        """Bring one stage up to date; its parents are.

        A stage that is up to date starts no process. Raises StageError when it fails, Stopped when the run is
        being stopped; either way the result says so.
        """
        result = self.results[name]
        try:
            if self.stop.is_set():
                raise Stopped
            if self.wanted is not None and name == rankings.STAGE:
                self._await_rankings(self.wanted)
            if self._up_to_date(name):
                result.state = "cached"
            else:
                slot = self._gpu if self.stages[name].meta.gpu else self._cpu
                with point.once(self.point, name, self.root, self.stop), slot:
                    result.state = self._reproduce(name, result)
        except Stopped:
            result.state = "stopped"
            raise
        except StageError as error:
            self._fail(result, error.code, error.message, error.log)
            raise
        except Exception as error:
            self._fail(result, exit_code(error), one_line(error))
            raise
        if self.parent is not None:
            self._record(name, self.parent, result)
        return result

    def settle_rest(self) -> None:
        """Bring up to date what nobody has settled yet, one stage after the other."""
        for name, stage in self.stages.items():
            ready = all(self.results[parent].state in GOOD for parent in self._parents(stage))
            if ready and self.results[name].state == "waiting":
                with contextlib.suppress(Exception):  # told in its result
                    self.settle(name)

    def close(self, page: Path | None = None) -> None:
        """After the last stage: name what never ran, and leave dvc.lock as a serial `dvc repro` would.

        The run's record in MLflow gets `page`, and links to the Prefect run and to it.
        """
        for result in self.results.values():
            if result.state in ("waiting", "running"):
                result.state = "stopped" if self.stop.is_set() else "not run"
        if self.due:
            pipeline.order_lock(self.root)
        if self.parent is not None:
            if page is not None:
                self.parent.artifact(page)
            note = links.note(self.flow_run_url, page)
            self.parent.tags({"prefect.flow_run_id": self.flow_run_id, "mlflow.note.content": note})
            tracking.end_parent(self.parent, _status(self.code))

    def _await_rankings(self, wanted: rankings.Wanted) -> None:
        """Wait for people, then settle again what reads the same folder as their rankings."""
        message = rankings.invitation(self.root, wanted)
        if rankings.enough(self.root, wanted):
            rankings.collect(self.root)
        else:
            say(f"{rankings.STAGE}: {message}")
            with self.pause(message) as told_to_go_on:
                rankings.await_enough(self.root, wanted, self.stop, told_to_go_on, say)
        self.wanted = None  # another attempt at the stage does not wait again
        above = with_ancestors(self.stages, self._parents(self.stages[rankings.STAGE]))
        for name in self.stages:
            if name in above and pipeline.changes(self.root, [name])[name]:
                self.due.add(name)
                self.settle(name)

    def _up_to_date(self, name: str) -> bool:
        """A stage that is due for what it reads alone is looked at again: that may be the same as before.

        One that has changed itself is left to DVC, which looks too.
        """
        if name in self.forced or self.changed[name]:
            return False
        return name not in self.due or not pipeline.changes(self.root, [name])[name]

    def _fail(self, result: Result, code: int, message: str, log: Path | None = None) -> None:
        result.state, result.code, result.message, result.log = "failed", code, message, log

    def _reproduce(self, name: str, result: Result) -> State:
        result.state, result.attempts = "running", result.attempts + 1
        result.code, result.message, result.log = 0, "", None  # of an attempt before
        started = time.monotonic()
        try:
            how = pipeline.run_stage(
                self.root,
                name,
                force=name in self.forced,
                environment=child_environment(self._ids(result)),
                seconds=self.stages[name].meta.timeout,
                stop=self.stop,
                tell=say,
            )
            return STATES[how]
        finally:
            result.seconds += time.monotonic() - started

    def _ids(self, result: Result) -> dict[str, str]:
        ids = {"LIFECYCLE_FLOW_RUN_ID": self.flow_run_id, "LIFECYCLE_ATTEMPT": str(result.attempts)}
        if self.parent is not None:
            ids["LIFECYCLE_PARENT_RUN_ID"] = self.parent.id
        if not has_gpu():
            ids[warm.VARIABLE] = os.environ.get(warm.VARIABLE, str(os.getpid()))  # a sweep offers its own
        return ids

    def _record(self, name: str, parent: Recorder, result: Result) -> None:
        """Tell MLflow what DVC has committed, and which run made it."""
        if result.state == "done" and (recording := pipeline.exit_record(self.root, name).get("recording")):
            outputs = dict(pipeline.recorded_outputs(self.root).get(name, []))
            tracking.tag_committed(parent, recording, outputs, commit(self.root))
        try:
            mark = fingerprint(name, self.root)
        except UserError as error:
            say(f"warning: {name} is not linked to its MLflow run: {error}")
        else:
            tracking.link(parent, name, mark, metrics(self.root, name))

    def _parents(self, stage: Stage) -> list[str]:
        return [parent for parent in stage.parents if parent in self.stages]


def ready(
    root: Path,
    settings: Sequence[str] = (),
    presets: Sequence[str] = (),
    targets: Iterable[str] = (),
    force: bool = False,
    jobs: int = 2,
    alone: bool = False,
    wanted: rankings.Wanted | None = None,
) -> Run:
    """A run as `plan` makes it, once params.yaml has the presets and settings, and all of it is checked.

    Files of DVC that a crash cut short are mended first. Raises UserError for wrong params, stages or dvc.yaml.
    """
    if settings or presets:
        from flows import params_file

        for line in params_file.change(root, presets, settings):
            say(f"params.yaml: {line}")
    for line in pipeline.mend(root):
        say(line)
    read_yaml(PARAMS_FILE)  # its own message for a broken file says more than DVC's
    planned = plan(root, targets, force, jobs, alone, wanted)
    if planned.due:
        check_all()
        refuse_what_cannot_fit(root, planned.due)
    return planned


def plan(
    root: Path,
    targets: Iterable[str] = (),
    force: bool = False,
    jobs: int = 2,
    alone: bool = False,
    wanted: rankings.Wanted | None = None,
) -> Run:
    """A run of the stages `targets` and all they need (not when they run `alone`); of every stage when none is
    named.

    `force` runs the named stages (all of them, when none is) though they are up to date. Raises UserError for
    an unknown stage, a wrong dvc.yaml, or rankings that are `wanted` though no stage of the run reads them.
    """
    graph = pipeline.read_graph(root)
    named = list(targets)
    for name in named:
        if name not in graph:
            raise UserError(f"--stage {name}: no such stage in dvc.yaml; it has {', '.join(graph)}")
    chosen = set(graph) if not named else set(named) if alone else with_ancestors(graph, named)
    stages = {name: stage for name, stage in graph.items() if name in chosen}
    if wanted is not None:
        rankings.check(root, stages)
    forced = frozenset(named or stages) if force else frozenset[str]()
    return Run(root, stages, pipeline.changes(root, list(stages)), forced, jobs, wanted)


def metrics(root: Path, name: str) -> dict[str, Any]:
    """What is in metrics/NAME.json; empty if there is none."""
    path = root / "metrics" / f"{name}.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def as_json(run: Run) -> list[dict[str, Any]]:
    """The results for scripts."""
    return [
        {**asdict(result), "log": str(result.log) if result.log else None, "seconds": round(result.seconds, 3)}
        for result in run.results.values()
    ]


def commit(root: Path) -> str | None:
    """The git commit that is checked out, or None outside git and before the first commit."""
    answer = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None


@contextlib.contextmanager
def _no_pause(_: str) -> Iterator[Callable[[], bool]]:
    yield lambda: False


def _status(code: int) -> Status:
    return "FINISHED" if code == 0 else "KILLED" if code == INTERRUPTED else "FAILED"


def with_ancestors(stages: Mapping[str, Stage], names: Iterable[str]) -> set[str]:
    """`names`, and all that they depend on."""
    found: set[str] = set()
    for name in names:
        if name not in found:
            found |= {name, *with_ancestors(stages, stages[name].parents)}
    return found


def _with_descendants(stages: Mapping[str, Stage], names: set[str]) -> set[str]:
    """`names` and all that depends on them; `stages` has parents before children."""
    found: set[str] = set()
    for name, stage in stages.items():
        if name in names or found & set(stage.parents):
            found.add(name)
    return found
