"""What `lifecycle status` says: of each stage whether it is up to date, and why not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from flows import pipeline
from flows.display import progress_text
from tasks.stage.errors import say

COLOURS = {
    "up to date": "green",
    "changed": "yellow",
    "parent changed": "yellow",
    "never run": "yellow",
    "running": "cyan",
}


def look(root: Path, graph: Mapping[str, pipeline.Stage] | None = None) -> list[dict[str, Any]]:
    """One entry a stage, in graph order: state (up to date, changed, parent changed, never run, running), why,
    progress, outputs with their hashes, the last run and how it ended. `graph` is read unless it is given."""
    graph = pipeline.read_graph(root) if graph is None else graph
    changes = pipeline.changes(root, list(graph))
    outputs = pipeline.recorded_outputs(root)
    entries: list[dict[str, Any]] = []
    stale: set[str] = set()
    for name, stage in graph.items():
        last = pipeline.exit_record(root, name)
        owner = _running(root / ".work" / name / "lock")
        changed_parents = [parent for parent in stage.parents if parent in stale]
        if changes[name] or changed_parents:
            stale.add(name)
        entries.append(
            {
                "stage": name,
                "state": _state(changes[name], changed_parents, owner),
                "why": [str(change) for change in changes[name]]
                or [f"after {parent}" for parent in changed_parents],
                "process": owner,
                "progress": pipeline.progress_record(root, name) if owner else {},
                "outputs": dict(outputs.get(name, [])),
                "mlflow_run": last.get("mlflow_run_id") or last.get("recording"),
                "last_exit_code": last.get("exit_code"),
                "last_message": last.get("message", ""),
                "last_ended": last.get("ended"),
            }
        )
    return entries


def show(entries: list[dict[str, Any]]) -> None:
    """Print a line a stage; under it what changed or how far it is, and its outputs with their hashes."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    width = max(len(entry["stage"]) for entry in entries)
    for entry in entries:
        line = Text.assemble((f"{entry['stage']:{width}}  ", "bold"), (entry["state"], COLOURS[entry["state"]]))
        console.print(line.append(_last(entry), "dim"), soft_wrap=True)
        below = [Text(f"why: {reason}") for reason in entry["why"]]
        if entry["progress"]:
            below = [Text(progress_text(entry["progress"]))]
        hashes = "  ".join(f"{path} {digest[:8]}" for path, digest in entry["outputs"].items())
        for text in (*below, Text(hashes, "dim")):
            if text:
                console.print(Padding(text, (0, 0, 0, width + 2)))
    if any(entry["why"] for entry in entries):
        say("`lifecycle run` brings the rest up to date")


def _state(changes: tuple[pipeline.Change, ...], changed_parents: list[str], owner: int | None) -> str:
    if owner is not None:
        return "running"
    if any(change.kind == "never run" for change in changes):
        return "never run"
    if changes:
        return "changed"
    return "parent changed" if changed_parents else "up to date"


def _last(entry: dict[str, Any]) -> str:
    if entry["last_exit_code"] is None:
        return ""
    parts = ["", f"last run {str(entry['last_ended'])[:16].replace('T', ' ')}"]
    if entry["last_exit_code"] != 0:
        parts.append(f"exit {entry['last_exit_code']}: {entry['last_message']}")
    if entry["mlflow_run"]:
        parts.append(f"MLflow {entry['mlflow_run'][:12]}")
    return " · ".join(parts)


def _running(lock: Path) -> int | None:
    """The process that holds a stage's lock. It is not tried: a stage that starts meanwhile must get it."""
    text = lock.read_text(encoding="ascii").strip() if lock.is_file() else ""
    if not text:
        return None
    try:
        started = psutil.Process(int(text)).create_time()
    except psutil.NoSuchProcess:
        return None
    return int(text) if started <= lock.stat().st_mtime + 1 else None
