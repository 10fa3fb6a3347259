"""What `lifecycle status` says: of each stage whether it is up to date, and why not; once, or at changes."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flows import pipeline
from flows.display import progress_text
from tasks.stage.errors import UserError, say
from tasks.stage.params import GRAPH_FILE, PARAMS_FILE

if TYPE_CHECKING:
    from rich.padding import Padding
    from rich.text import Text

SECONDS_BETWEEN_GLANCES = 0.5
SECONDS_BETWEEN_LOOKS = 30.0  # at what only DVC sees, such as a data file
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
    from rich.text import Text

    console = Console()
    for line in _lines(entries, hashes=True):
        console.print(line, soft_wrap=isinstance(line, Text))
    if any(entry["why"] for entry in entries):
        say("`lifecycle run` brings the rest up to date")


def watch(root: Path, as_json: bool) -> None:
    """Show the status until KeyboardInterrupt, anew whenever it changes; as JSON, one line for each change.

    Raises UserError when it is neither for a terminal nor JSON.
    """
    from rich.console import Console, Group
    from rich.live import Live

    console = Console()
    if not as_json and not console.is_terminal:
        raise UserError("--watch is for a terminal; with --json it writes a line for each change")
    with contextlib.suppress(KeyboardInterrupt):
        if as_json:
            for entries in _each_change(root):
                sys.stdout.write(json.dumps({"stages": entries}, sort_keys=True, ensure_ascii=False) + "\n")
                sys.stdout.flush()
        with Live(console=console, auto_refresh=False) as live:
            for entries in _each_change(root):
                live.update(Group(*_lines(entries, hashes=False)), refresh=True)


def _each_change(root: Path) -> Iterator[list[dict[str, Any]]]:
    """The entries of `look`, now and after each change, for ever.

    Files that tell of a change are glanced at; DVC is asked only when one of them did, or after a while.
    """
    shown: list[dict[str, Any]] = []
    entries, seen, looked = shown, _glance(root), 0.0
    while True:
        now = _glance(root)
        if now != seen or time.monotonic() - looked > SECONDS_BETWEEN_LOOKS or not shown:
            entries, seen, looked = look(root), now, time.monotonic()
        current = [
            {**entry, "progress": pipeline.progress_record(root, entry["stage"])} if entry["process"] else entry
            for entry in entries
        ]
        if current != shown:
            shown = current
            yield shown
        time.sleep(SECONDS_BETWEEN_GLANCES)


def _glance(root: Path) -> dict[str, Any]:
    """When the files were written that say what is to be done and what was done, and who runs."""
    names = (pipeline.LOCK_FILE, GRAPH_FILE, PARAMS_FILE)
    paths = [*(root / name for name in names), *root.glob(".work/*/last.json")]
    written = {str(path): path.stat().st_mtime_ns for path in paths if path.exists()}
    return {**written, **{str(lock): _running(lock) for lock in root.glob(".work/*/lock")}}


def _lines(entries: list[dict[str, Any]], hashes: bool) -> "list[Text | Padding]":
    from rich.padding import Padding
    from rich.text import Text

    found: list[Text | Padding] = []
    width = max(len(entry["stage"]) for entry in entries)
    for entry in entries:
        line = Text.assemble((f"{entry['stage']:{width}}  ", "bold"), (entry["state"], COLOURS[entry["state"]]))
        found.append(line.append(_last(entry), "dim"))
        below = [Text(f"why: {reason}") for reason in entry["why"]]
        if entry["progress"]:
            below = [Text(progress_text(entry["progress"]))]
        if hashes and entry["outputs"]:
            outputs = (f"{path} {digest[:8]}" for path, digest in entry["outputs"].items())
            below.append(Text("  ".join(outputs), "dim"))
        found += [Padding(text, (0, 0, 0, width + 2)) for text in below]
    return found


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
