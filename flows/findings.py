"""What `lifecycle report` tells of: the graph, the numbers, the curves, where all of it comes from.

Everything is read from files that are there. What is missing or cannot be read is left out: a page of half a
pipeline is better than none.
"""

import csv
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from flows import pipeline, run, status
from tasks.stage import tracking
from tasks.stage.errors import UserError, one_line, say
from tasks.stage.files import write_json
from tasks.stage.params import PARAMS_FILE, read_yaml

MLFLOW_RUNS = Path(".work") / "mlflow-runs.json"  # what MLflow said of runs that have ended: it stays as it is
WEIGHTS = "*.safetensors"
WHOLE_METHODS = ("full", "bitfit")  # of fine-tuning, that write a whole model; the others an adapter
SPEED = "tokens_per_second"
STOPPED = (129, 130, 143)  # exit codes: somebody asked the stage to stop


class Output(NamedTuple):
    """An output in dvc.lock; `size` in bytes, of a folder that of its files together."""

    path: str
    digest: str
    size: int | None


@dataclass(frozen=True)
class StageFound:
    """A stage and how it stands. `seconds` of its last run; None when nobody knows."""

    stage: pipeline.Stage
    state: str
    why: tuple[str, ...]
    started: str
    ended: str
    seconds: float | None
    mlflow_run: str
    flow_run: str
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Findings:
    """All that the page shows. `recorded` has, by stage, the numbers that MLflow alone knows."""

    root: Path
    when: datetime
    commit: str
    changed: bool
    stages: Mapping[str, StageFound]
    params: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    recorded: Mapping[str, Mapping[str, float]]


class Size(NamedTuple):
    """Bytes of weights, and where the number comes from."""

    bytes: int
    source: str


def look(root: Path) -> Findings:
    """Read all of it. Raises UserError when dvc.yaml is wrong."""
    graph = pipeline.read_graph(root)
    entries = status.look(root, graph)
    states = _states(entries)
    outputs = _outputs(root)
    records = {name: pipeline.exit_record(root, name) for name in graph}
    known = _mlflow(root, [str(record.get("mlflow_run_id") or "") for record in records.values()])
    stages, recorded = {}, {}
    for entry in entries:
        name = entry["stage"]
        record = records[name]
        run_id = str(record.get("mlflow_run_id") or "")
        about = known.get(run_id, {})
        recorded[name] = about.get("metrics", {})
        stages[name] = StageFound(
            stage=graph[name],
            state=states[name],
            why=(entry["last_message"],) if states[name] in ("failed", "stopped") else tuple(entry["why"]),
            started=str(record.get("started") or ""),
            ended=str(record.get("ended") or ""),
            seconds=_seconds(record),
            mlflow_run=run_id,
            flow_run=str(about.get("flow_run") or ""),
            outputs=tuple(outputs.get(name, [])),
        )
    return Findings(
        root=root,
        when=datetime.now(UTC),
        commit=run.commit(root) or "",
        changed=_changed(root),
        stages=stages,
        params=_params(root),
        metrics={name: _metrics(root, name) for name in graph},
        recorded=recorded,
    )


def size(found: Findings, model: str) -> Size | None:
    """The bytes of the weights that answering with models/MODEL needs: an adapter's with those of its base.

    From the files when they are there, else from the stage's metrics, else from dvc.lock; else None.
    """
    folder = found.root / "models" / model
    own = sum(path.stat().st_size for path in folder.glob(WEIGHTS))
    if own:
        base = _base_of(folder)
        if base is None:
            return Size(own, "weights")
        below = sum(path.stat().st_size for path in (found.root / base).glob(WEIGHTS)) or _size_in_lock(
            found, base
        )
        return Size(own + below, "adapter and base") if below else Size(own, "adapter alone")
    metrics = found.metrics.get(model, {})
    if isinstance(metrics.get("bytes"), int):
        return Size(metrics["bytes"], f"metrics/{model}.json")
    whole = _size_in_lock(found, f"models/{model}")
    if not whole:
        return None
    method = found.params.get(model, {}).get("method") if isinstance(found.params.get(model), Mapping) else None
    if model == "finetune" and method not in WHOLE_METHODS:
        base_size = _size_in_lock(found, "models/base")
        return Size(whole + base_size, "dvc.lock, adapter and base") if base_size else None
    return Size(whole, "dvc.lock, whole folder")


def speeds(found: Findings) -> dict[str, float]:
    """How many times as fast as the model before it was made smaller: `distill`, `prune`, and `quantize.SCHEME`
    of each scheme, in tokens/s on the largest batch that was timed. Only what MLflow knows."""
    ratios = {}
    for stage in ("distill", "prune"):
        if ratio := found.recorded.get(stage, {}).get("speed_ratio"):
            ratios[stage] = ratio
    timed = found.recorded.get("quantize", {})
    batches = [int(name.rsplit("_", 1)[1]) for name in timed if f".{SPEED}_batch_" in name]
    if batches:
        end = f".{SPEED}_batch_{max(batches)}"
        dense = timed.get(f"dense{end}")
        for name, value in timed.items():
            if dense and name.endswith(end):
                ratios[f"quantize.{name.removesuffix(end)}"] = value / dense
    return ratios


def points(path: Path, column: str) -> list[tuple[float, float]]:
    """(step, value) of a column of a CSV file with a column `step`; rows without numbers are left out, and so
    is a file that is not there."""
    found = []
    for row in rows(path):
        try:
            found.append((float(row["step"]), float(row[column])))
        except (KeyError, TypeError, ValueError):
            continue
    return found


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none when it is not there."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none when it is not there, and without the lines that are broken."""
    found = []
    for line in text(path).splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def text(path: Path) -> str:
    """The text of a file; empty when it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _states(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """up to date · changed (since it ran) · not run · not here (only files are missing, as in a fresh clone) ·
    running · failed · stopped (by somebody)."""
    found: dict[str, str] = {}
    for entry in entries:
        why = entry["why"]
        if entry["state"] == "running":
            state = "running"
        elif entry["last_exit_code"] not in (None, 0) and entry["state"] != "up to date":
            state = "stopped" if entry["last_exit_code"] in STOPPED else "failed"
        elif entry["state"] == "never run":
            state = "not run"
        elif not why:
            state = "up to date"
        elif all(
            reason.endswith(" deleted") or found.get(reason.removeprefix("after ")) == "not here"
            for reason in why
        ):
            state = "not here"
        else:
            state = "changed"
        found[entry["stage"]] = state
    return found


def _outputs(root: Path) -> dict[str, list[Output]]:
    return {
        name: [
            Output(str(output["path"]), str(output["md5"]), output.get("size"))
            for output in entry.get("outs", [])
            if "md5" in output
        ]
        for name, entry in pipeline.recorded(root).items()
    }


def _seconds(record: Mapping[str, Any]) -> float | None:
    try:
        began, ended = (datetime.fromisoformat(record[name]) for name in ("started", "ended"))
    except (KeyError, TypeError, ValueError):
        return None
    return (ended - began).total_seconds()


def _metrics(root: Path, name: str) -> Mapping[str, Any]:
    try:
        found = run.metrics(root, name)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _params(root: Path) -> Mapping[str, Any]:
    try:
        return read_yaml(root / PARAMS_FILE)
    except (OSError, UserError):
        return {}


def _changed(root: Path) -> bool:
    answer = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return bool(answer.stdout.strip())


def _base_of(folder: Path) -> str | None:
    """The folder of the base model that an adapter names; None for a whole model."""
    try:
        named = json.loads(text(folder / "adapter_config.json")).get("base_model_name_or_path")
    except ValueError:
        return None
    return str(named) if named else None


def _size_in_lock(found: Findings, path: str) -> int:
    sizes = [output.size for each in found.stages.values() for output in each.outputs if output.path == path]
    return next((size for size in sizes if size), 0)


def _mlflow(root: Path, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`metrics` (speeds alone) and `flow_run` of MLflow runs. MLflow is asked once of each: importing its
    client takes seconds."""
    kept = _kept(root)
    wanted = {run_id for run_id in ids if run_id}
    missing = sorted(wanted - kept.keys())
    if not missing or os.environ.get("LIFECYCLE_TRACKING") == "off":
        return kept
    try:
        answers = tracking.known(missing)
    except Exception as error:  # whatever a client may raise: the page is there without speeds
        say(f"warning: MLflow says nothing of earlier runs ({one_line(error)[:120]}); the page has no speeds")
        return kept
    for run_id, (metrics, tags) in answers.items():
        kept[run_id] = {
            "metrics": {name: value for name, value in metrics.items() if "speed" in name or SPEED in name},
            "flow_run": tags.get("prefect.flow_run_id", ""),
        }
    kept = {run_id: about for run_id, about in kept.items() if run_id in wanted}
    write_json(root / MLFLOW_RUNS, kept)
    return kept


def _kept(root: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(text(root / MLFLOW_RUNS))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
