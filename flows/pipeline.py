"""The DVC graph, and how to run one stage of it: the only module that knows DVC.

The graph and what changed are read in this process, without DVC's locks: beside a running stage, DVC's own
`status` says "busy". Stages run through `dvc repro --single-item`, so DVC alone decides what is up to date,
deletes, caches and records.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from flows import child, processes
from tasks.stage.errors import UserError, one_line
from tasks.stage.files import write_text
from tasks.stage.params import GRAPH_FILE, Section, validate

LOCK_FILE = "dvc.lock"
SECONDS_BETWEEN_TRIES = 1.0
SECONDS_BETWEEN_READS = 0.1
TIMES_TO_READ = 4
TRY_AGAIN = 75
NO_RETRY = {2, 3, 130, 143}  # wrong use, params or data · a gate said no · interrupted
_reading = threading.RLock()  # DVC's objects are not made for several threads

How = Literal["ran", "restored", "unchanged"]
T = TypeVar("T")


class Meta(Section):
    """What a runner is told about a stage, in the stage's `meta:` in dvc.yaml; each key may be left out there.

    `retries` after a crash, with `retry_delay` seconds before each; `timeout` in seconds; `gpu` stages run one
    at a time; `show` names the metrics that the result table prints.
    """

    retries: NonNegativeInt
    retry_delay: NonNegativeFloat
    timeout: PositiveFloat | None
    gpu: bool
    show: tuple[str, ...]


USUAL_META: dict[str, Any] = {"retries": 1, "retry_delay": 5.0, "timeout": None, "gpu": False, "show": []}


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml; `parents` are the stages whose outputs it reads."""

    name: str
    command: str
    parents: tuple[str, ...]
    outputs: tuple[str, ...]
    meta: Meta


@dataclass(frozen=True)
class Change:
    """One reason why a stage is not up to date: `finetune.epochs` (a param) went from `1` to `2`."""

    kind: Literal["never run", "command", "param", "input", "output", "always"]
    what: str = ""
    how: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "never run":
                return "never run"
            case "command":
                return "its command changed"
            case "always":
                return "it always runs"
        return f"{self.kind} {self.what} {self.how}"


class StageError(Exception):
    """A stage did not end well: `code` is its exit code, `message` one line, `log` the file with its output.

    `made` says that its outputs are there all the same, and DVC alone failed.
    """

    def __init__(self, stage: str, code: int, message: str, log: Path, made: bool = False) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage, self.code, self.message, self.log, self.made = stage, code, message, log, made

    @property
    def crashed(self) -> bool:
        """Whether the stage gave no answer: its output says more than the message."""
        return self.code not in {*NO_RETRY, TRY_AGAIN}

    @property
    def worth_retrying(self) -> bool:
        """Crashes and "try again later" may pass; wrong params, wrong data and a gate's refusal stay.

        DVC would first delete what is made.
        """
        return self.code not in NO_RETRY and not self.made


def read_graph(root: Path) -> dict[str, Stage]:
    """The stages of dvc.yaml, each after its parents: the order of a serial `dvc repro`.

    Raises UserError when dvc.yaml is wrong.
    """
    return _read(root, _graph)


def changes(root: Path, names: Sequence[str]) -> dict[str, tuple[Change, ...]]:
    """Why each of the stages would run if it were asked now; nothing for one that is up to date."""

    def look(repository: Any) -> dict[str, tuple[Change, ...]]:
        found = {stage.name: stage for stage in repository.index.stages if stage.cmd}
        recorded = _recorded(repository)
        return {name: tuple(_changes(found[name], name in recorded)) for name in names}

    return _read(root, look)


def run_stage(
    root: Path,
    name: str,
    *,
    force: bool,
    environment: Mapping[str, str],
    seconds: float | None,
    stop: threading.Event,
    tell: Callable[[str], None],
) -> How:
    """Have DVC reproduce one stage, and nothing else; waits while another DVC works on the same files.

    Afterwards nothing that it started is alive. Raises StageError, and Stopped once `stop` is set.
    """
    log = root / ".work" / name / "output.log"
    force_option = ["--force"] if force else []
    told: set[str] = set()
    while True:
        _wait_for_others(root, name, stop, lambda line: _tell_once(line, told, tell))
        _progress_file(root, name).unlink(missing_ok=True)  # of an earlier run
        before = exit_record(root, name)
        try:
            status = processes.run(
                child.command("dvc", "--wait-for-lock", "repro", "--single-item", *force_option, name),
                folder=root,
                environment=environment,
                log=log,
                seconds=seconds,
                stop=stop,
            )
        except processes.TimeUp:
            message = f"took longer than {seconds:g} s, its timeout in dvc.yaml"
            raise StageError(name, 124, message, log) from None
        output = log.read_text(encoding="utf-8", errors="replace")
        if status == 0:
            return _how(output)
        after = exit_record(root, name)
        ended = after != before
        if ended and after["exit_code"] != 0:
            raise StageError(name, after["exit_code"], after["message"], log)
        if full := re.search(r"^ERROR: .*(No space left on device.*)", output, re.MULTILINE):
            message = f"{full[1]}: make room and run again"
            if ended:
                message = f"{full[1]}: make room, and `dvc commit --force {name}` keeps what the stage has made"
            raise StageError(name, TRY_AGAIN, message, log, made=ended)
        blocker = _lock_trouble(output)
        if blocker is None:
            raise StageError(name, *_outcome(status, output), log)
        _tell_once(f"{name} waits: {blocker}", told, tell)
        if stop.wait(SECONDS_BETWEEN_TRIES):
            raise processes.Stopped


def exit_record(root: Path, name: str) -> dict[str, Any]:
    """What the stage wrote when it last ended (exit_code, message, recording, mlflow_run_id); {} if nothing."""
    return _read_json(root / ".work" / name / "last.json")


def progress_record(root: Path, name: str) -> dict[str, Any]:
    """What a running stage says of its progress (description, done, total, figures, pid); empty if nothing."""
    return _read_json(_progress_file(root, name))


def _progress_file(root: Path, name: str) -> Path:
    return root / ".work" / name / "progress.json"


def recorded(root: Path) -> dict[str, dict[str, Any]]:
    """The entry of each stage in dvc.lock: cmd, deps, params, outs."""
    return _read(root, _recorded)


def recorded_outputs(root: Path) -> dict[str, list[tuple[str, str]]]:
    """(path, hash) of each output of each stage, as in dvc.lock."""
    return {
        name: [(output["path"], output["md5"]) for output in entry.get("outs", []) if "md5" in output]
        for name, entry in recorded(root).items()
    }


def cache_folder(root: Path) -> Path:
    """Where DVC keeps the contents of outputs, by their hash."""
    return Path(_read(root, lambda repository: repository.cache.local.path))


def uncached_outputs(root: Path) -> list[str]:
    """The outputs that DVC knows by their hash and does not keep: git does."""
    return _read(
        root, lambda repository: [output.def_path for output in repository.index.outs if not output.use_cache]
    )


def share_cache(root: Path, folder: Path) -> None:
    """Make the repository in `folder` keep its outputs where that at `root` does, with its local settings."""
    settings = Path(".dvc", "config.local")
    if (root / settings).is_file():
        shutil.copy(root / settings, folder / settings)
    cache = _read(root, lambda repository: str(repository.cache.local_cache_dir))
    with _repository(folder) as repository, repository.config.edit("local") as config:
        config.setdefault("cache", {})["dir"] = cache


def checkout(root: Path, *options: str) -> None:
    """Put the outputs that dvc.lock names in their places, from the cache. Raises UserError when it cannot."""
    done = subprocess.run(
        child.command("dvc", "checkout", "--quiet", *options),
        cwd=root,
        env={**os.environ, "DVC_SITE_CACHE_DIR": str(root / ".work" / "dvc")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"dvc checkout in {root}: {_last_line(done.stderr, 'no reason given')}")


def order_lock(root: Path) -> None:
    """Write dvc.lock in the order of the graph, so that a parallel run leaves the bytes of a serial one.

    Raises UserError when dvc.yaml is wrong.
    """
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    path = root / LOCK_FILE
    with _repository(root, wait=True) as repository, repository.lock:
        if not path.exists() or _lock_fault(path):
            return  # `mend` sees to it when the next run starts
        place = {name: number for number, name in enumerate(_graph(repository))}

        def ordered(names: Iterable[str]) -> list[str]:
            return sorted(names, key=lambda name: place.get(name, len(place)))

        found = list(_recorded(repository))
        if found != ordered(found):
            data = parse_yaml_for_update(path.read_text(encoding="utf-8"), str(path))
            data["stages"] = {name: data["stages"][name] for name in ordered(found)}
            write_text(path, dumps_yaml(data))


def mend(root: Path) -> list[str]:
    """Put out of the way what a crash cut short in DVC's own files; returns a line for each that was.

    Outputs are not lost with it: DVC finds them again in its run-cache. Raises UserError when dvc.lock holds
    the marks of a merge conflict.
    """
    done = []
    with _repository(root, wait=True) as repository, repository.lock:
        busy = Path(repository.tmp_dir) / "rwlock"
        if busy.exists() and not _is_json(busy):
            busy.unlink()
            done.append(f"{busy.relative_to(root)} was cut short (a crash?): removed")
        path = root / LOCK_FILE
        if path.exists() and (fault := _lock_fault(path)):
            text = path.read_text(encoding="utf-8", errors="replace")
            if "<<<<<<< " in text:
                raise UserError(
                    f"{LOCK_FILE} has merge conflicts: take one side (git checkout --ours {LOCK_FILE})"
                )
            path.rename(path.with_suffix(".lock.broken"))
            done.append(f"{LOCK_FILE} cannot be read ({fault}): moved to {LOCK_FILE}.broken and written anew")
    return done


def update_imports(root: Path) -> list[str]:
    """Fetch anew what `dvc import` and `dvc import-url` brought here and has changed where it comes from.

    Returns the paths that changed. Raises UserError when a source cannot be read.
    """
    changed = []
    # what DVC has to say goes to stderr: stdout is for results
    with contextlib.redirect_stdout(sys.stderr), _repository(root, wait=True) as repository:
        for stage in sorted((each for each in repository.index.stages if each.is_import), key=str):
            before = stage.outs[0].hash_info
            [updated] = repository.update(stage.relpath)
            if updated.outs[0].hash_info != before:
                changed.append(os.path.relpath(updated.outs[0].fs_path, root))
    return changed


def _read(root: Path, look: Callable[[Any], T]) -> T:
    """What `look` finds in the repository. DVC rewrites dvc.lock in place: what is cut short is read again."""
    for _ in range(TIMES_TO_READ - 1):
        try:
            with _repository(root) as repository:
                return look(repository)
        except UserError:
            time.sleep(SECONDS_BETWEEN_READS)
    with _repository(root) as repository:
        return look(repository)


def _graph(repository: Any) -> dict[str, Stage]:
    from dvc.repo.reproduce import get_active_graph, plan_repro

    graph = get_active_graph(repository.index.graph)
    return {
        found.name: Stage(
            name=found.name,
            command=found.cmd if isinstance(found.cmd, str) else "\n".join(found.cmd),
            parents=tuple(sorted(parent.name for parent in graph.successors(found) if parent.cmd)),
            outputs=tuple(output.def_path for output in found.outs),
            meta=_meta(found.name, found.meta),
        )
        for found in plan_repro(graph)
        if found.cmd
    }


@contextlib.contextmanager
def _repository(root: Path, wait: bool = False) -> Iterator[Any]:
    """DVC's view of the workspace, as it is now. What DVC says is wrong becomes a UserError of one line."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with _reading:
        try:
            repository = Repo(str(root), _wait_for_lock=wait)
            try:
                yield repository
            finally:
                repository.close()
        except DvcException as error:
            raise UserError(one_line(error)) from None


def _meta(name: str, found: Any) -> Meta:
    values = {**USUAL_META, **found} if isinstance(found, dict) else found or USUAL_META
    return validate(values, f"{name}.meta", Meta, GRAPH_FILE)


def _changes(stage: Any, recorded: bool) -> Iterator[Change]:
    from dvc.dependency import ParamsDependency

    if not recorded:
        yield Change("never run")
        return
    if stage.changed_stage():
        yield Change("command")
    if stage.is_callback or stage.always_changed:
        yield Change("always")
    for dependency in [] if stage.frozen else stage.deps:
        if isinstance(dependency, ParamsDependency):
            yield from _param_changes(dependency)
        elif dependency.status():
            yield Change("input", dependency.def_path, _how_changed(dependency))
    for output in stage.outs:
        if output.status():
            yield Change("output", output.def_path, _how_changed(output))


def _how_changed(entry: Any) -> str:
    return ", ".join(str(how) for how in entry.status().values())


def _param_changes(dependency: Any) -> Iterator[Change]:
    if not dependency.status():
        return
    before = _flat(dependency.hash_info.value or {})
    now = _flat(dependency.read_params(flatten=False))
    for key in sorted({*before, *now}):
        if before.get(key, now) != now.get(key, before):
            yield Change("param", key, f"{_shown(before, key)} → {_shown(now, key)}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    text = json.dumps(values[key], default=str, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _recorded(repository: Any) -> dict[str, dict[str, Any]]:
    """The entries of dvc.lock."""
    from dvc.utils.serialize import load_yaml

    path = Path(repository.root_dir, LOCK_FILE)
    if not path.exists():
        return {}
    return dict((load_yaml(str(path)) or {}).get("stages", {}))


def _lock_fault(path: Path) -> str | None:
    """What is wrong with dvc.lock, in one line."""
    from dvc.dvcfile import Lockfile
    from dvc.exceptions import DvcException
    from dvc.utils.serialize import load_yaml

    try:
        Lockfile.validate(load_yaml(str(path)), str(path))
    except (DvcException, UnicodeDecodeError) as error:
        return one_line(error)
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _wait_for_others(root: Path, name: str, stop: threading.Event, tell: Callable[[str], None]) -> None:
    """Wait until nobody runs the stage; an orphan of a run that was killed is ended."""
    while (owner := processes.clear_the_way(root / ".work" / name / "lock", stop)) is not None:
        tell(f"{name} runs already as process {owner}: waiting for it")
        if stop.wait(SECONDS_BETWEEN_TRIES):
            break
    if stop.is_set():
        raise processes.Stopped


def _tell_once(line: str, told: set[str], tell: Callable[[str], None]) -> None:
    if line not in told:
        told.add(line)
        tell(line)


def _how(output: str) -> How:
    if re.search(r"^Running stage ", output, re.MULTILINE):
        return "ran"
    if "is cached - skipping run" in output:
        return "restored"
    return "unchanged"


def _lock_trouble(output: str) -> str | None:
    """Who holds what DVC needs, if that is why it gave up."""
    if busy := re.search(r"'(.+)' is busy, it is being blocked by:\s*(.*)", output):
        return f"{Path(busy[1]).name} is in use by {busy[2].strip()}"
    if "Unable to acquire lock" in output:
        return "another DVC has the repository"
    return None


def _outcome(status: int, output: str) -> tuple[int, str]:
    """(exit code, message) of a stage that left no record of its end."""
    if status < 0:
        return 128 - status, f"DVC was killed by signal {-status}"
    if exited := re.search(r"failed to run: .*, exited with (-?\d+)", output):
        code = int(exited[1])
        return (
            (128 - code, f"killed by signal {-code}")
            if code < 0
            else (code, _last_line(output, f"exit code {code}"))
        )
    return 1, _last_line(output, f"DVC ended with {status}")


def _last_line(output: str, otherwise: str) -> str:
    """The last line that the stage itself wrote, or DVC's complaint if there is none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [
        line for line in lines if not line.startswith(("Running stage ", "> ", "ERROR: failed to reproduce"))
    ]
    return own[-1].removeprefix("ERROR: ") if own else otherwise
