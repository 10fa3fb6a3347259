"""What `lifecycle compare` can be given, each read into params and metrics with dotted names."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import pipeline, report, run, snapshot, sweep, sweep_display
from flows.sweep import Record, Sweep
from tasks.stage import tracking
from tasks.stage.errors import UserError
from tasks.stage.params import COMMANDS, PARAMS_FILE, read_yaml
from tasks.stage.recorder import flat, metric_name
from tasks.stage.secrets import redacted

KINDS = ("run", "sweep", "git", "models")
RUN_ID = r"[0-9a-f]{4,32}"
WORDS = {"None": "null", "True": "true", "False": "false"}


@dataclass(frozen=True)
class Side:
    """One of the things that are compared. `params` are texts by SECTION.KEY, `metrics` numbers by STAGE.KEY;
    `run_id` is its pipeline's run in MLflow, where it is known to have one."""

    label: str
    kind: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    run_id: str | None = None


def sides(root: Path, wanted: str) -> list[Side]:
    """What `wanted` names: one side, or one for each point that is done of a whole sweep.

    `.` is the workspace; run:ID, sweep:NAME, sweep:NAME/POINT, git:REVISION and models:NAME/VERSION say what is
    meant, and without the first word all are tried. Raises UserError when nothing, or more than one, fits.
    """
    if wanted == ".":
        return [_workspace(root)]
    kind, colon, name = wanted.partition(":")
    ways: dict[str, Callable[[Path, str], list[Side]]] = {
        "sweep": _sweep,
        "git": _git,
        "run": _run,
        "models": _version,
    }
    if colon and kind in KINDS:
        found = ways[kind](root, name)
        if not found:
            raise UserError(f"{wanted}: there is no such {_noun(kind)}")
        return found
    fitting = {kind: found for kind, way in ways.items() if (found := way(root, wanted))}
    if len(fitting) > 1:
        forms = " or ".join(f"{kind}:{wanted}" for kind in fitting)
        raise UserError(f"{wanted} may be more than one thing: write {forms}")
    if not fitting:
        raise UserError(
            f"{wanted} is no sweep, git revision, MLflow run or registered version: `lifecycle sweep --list`, "
            "`git log`, `lifecycle ui` and `lifecycle lineage` show which there are"
        )
    return next(iter(fitting.values()))


def _workspace(root: Path) -> Side:
    graph = pipeline.read_graph(root)
    return Side(
        "workspace",
        "workspace",
        _params(read_yaml(root / PARAMS_FILE)),
        _metrics({name: run.metrics(root, name) for name in graph}),
    )


def _git(root: Path, name: str) -> list[Side]:
    commit = snapshot.revision(root, name)
    text = snapshot.read(root, commit, str(PARAMS_FILE)) if commit is not None else None
    if commit is None or text is None:
        return []
    stages = snapshot.files(root, commit, ["metrics/"])
    found = {Path(path).stem: json.loads(snapshot.read(root, commit, path) or "{}") for path in stages}
    return [Side(f"{name} ({commit[:7]})", "git", _params(_yaml(text, name)), _metrics(found))]


def _sweep(root: Path, name: str) -> list[Side]:
    which, slash, point = name.partition("/")
    if which not in sweep.names(root):
        return []
    known = sweep.load(root, which)
    if slash:
        return [_point(root, known, sweep.find(root, which, point))]
    done = [record for record in sweep.records(root, which) if record.state == "done"]
    if not done:
        raise UserError(f"sweep {which} has no point that is done: `lifecycle sweep --continue {which}`")
    return [_point(root, known, record) for record in done]


def _point(root: Path, known: Sweep, record: Record) -> Side:
    if record.commit is None:
        raise UserError(f"point {known.name}/{record.name} is {record.state}, not done")
    text = snapshot.read(root, record.commit, str(PARAMS_FILE)) or ""
    return Side(
        f"{known.name}/{record.name}",
        "sweep",
        _params(_yaml(text, record.name)),
        _named(sweep_display.metrics_of(root, record)),
        tracking.newest_run({"sweep": known.name, "sweep.number": str(record.number), "sweep.early": "false"}),
    )


def _run(root: Path, name: str) -> list[Side]:
    if not re.fullmatch(RUN_ID, name):
        return []
    found = tracking.runs_by_id(name)
    if len(found) > 1:
        raise UserError(f"{name} begins the ids of {len(found)} MLflow runs: write more of it")
    if not found:
        return []
    known = found[0]
    if parent := known.tags.get("mlflow.parentRunId"):
        raise UserError(f"{name} is the MLflow run of one stage; that of its pipeline is {parent}")
    own = known.params or tracking.params_of_stages(known)
    params = {key: _text(value) for key, value in own.items() if key.partition(".")[0] not in COMMANDS}
    metrics = {key: value for key, value in known.metrics.items() if "/" not in key and "." in key}
    return [Side(f"{known.name} ({known.id[:7]})", "run", params, metrics, known.id)]


def _version(root: Path, name: str) -> list[Side]:
    from tasks.registry import store
    from tasks.registry.register import Params
    from tasks.stage.params import read_section

    model, slash, wanted = name.lstrip("/").rpartition("/")
    if not slash:
        data = read_yaml(root / PARAMS_FILE)
        if "register" not in data:
            return []
        model = read_section(data, "register", Params).name
    found = store.look(model, wanted)
    if found is None:
        return []
    known = json.loads(store.read(found, "lineage.json"))
    evaluation = {"evaluate": json.loads(store.read(found, "evaluate.json"))}
    return [Side(f"{model} version {found.number}", "models", _params(known["params"]), _metrics(evaluation))]


def _params(values: Mapping[str, Any]) -> dict[str, str]:
    """All but the sections of commands, as the texts that MLflow has of them."""
    kept = {key: value for key, value in values.items() if key not in COMMANDS}
    return {key: _text(str(value)) for key, value in flat(redacted(kept)).items()}


def _text(value: str) -> str:
    """One text for one value, whether YAML, a stage or MLflow wrote it: null for None, 5 for 5.0."""
    try:
        number = float(value)
    except ValueError:
        return WORDS.get(value, value)
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def _metrics(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return _named(report.flat(stages))


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    return {metric_name(name): value for name, value in metrics.items()}


def _yaml(text: str, name: str) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{PARAMS_FILE} of {name} cannot be read")
    return found


def _noun(kind: str) -> str:
    return {"run": "MLflow run", "sweep": "sweep", "git": "git revision", "models": "registered version"}[kind]


def all_sides(root: Path, wanted: Iterable[str]) -> list[Side]:
    """The sides that all of `wanted` name, each once. Raises UserError when there are fewer than two."""
    found = {side.label: side for each in wanted for side in sides(root, each)}
    if len(found) < 2:
        raise UserError(f"nothing to compare with {', '.join(found)}: name another, `.` is the workspace")
    return list(found.values())
