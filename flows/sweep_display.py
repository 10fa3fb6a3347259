"""What is seen of a sweep: bars on a terminal, plain lines elsewhere, one table at the end (on stdout)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from flows import grid, pipeline, report, snapshot
from flows.display import COLOURS, Display
from flows.run import GOOD
from flows.sweep import Record, Sweep, Work, log_path, read_log

FIGURES = 6  # columns of metrics, where nobody says which
HEADER_WIDTH = 10  # of a metric's name, in letters
STATES = COLOURS | {"pruned": "dim", "waiting": "dim"}
SETTLED = ("done", "failed", "pruned", "stopped")


def display(work: Work, records: Sequence[Record], total: int, quiet: bool) -> Display:
    """Bars when stderr is a terminal, plain lines when it is not; `quiet` shows plain lines too. `records` may
    grow while it shows; `total` is how many there will be."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal and not quiet:
        return Bars(work, records, total, console)
    return Lines(work, records, total, console)


class Lines:
    """A line when a point starts and ends, and when one of its stages does."""

    def __init__(self, work: Work, records: Sequence[Record], total: int, console: Console) -> None:
        self._work, self._records, self._total, self._console = work, records, total, console
        self._shown = {record.number: record.state for record in records}
        self._stages: dict[int, dict[str, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()

    def refresh(self) -> None:
        for record in list(self._records):
            if record.state == "running" or self._shown.get(record.number) == "running":
                self._tell_stages(record)
            if self._shown.get(record.number, "waiting") != record.state:
                self._shown[record.number] = record.state
                self._tell(f"{record.name}: {_ending(record)}")

    def _tell_stages(self, record: Record) -> None:
        before = self._stages.setdefault(record.number, {})
        now, _ = read_log(log_path(self._work.root, self._work.sweep.name, record))
        for stage, state in now.items():
            if before.get(stage) != state and state != "cached":
                self._tell(f"{record.name}: {stage} {state}")
        self._stages[record.number] = now

    def _tell(self, line: str) -> None:
        settled = sum(record.state in SETTLED for record in self._records)
        self._console.print(f"[{settled}/{self._total}] {line}", soft_wrap=True, markup=False)


class Bars:
    """One bar for the sweep, with the time left, and one for each running point."""

    def __init__(self, work: Work, records: Sequence[Record], total: int, console: Console) -> None:
        self._work, self._records = work, records
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._whole = self._progress.add_task(f"[bold]{work.sweep.name}", total=total)
        self._stages = len(pipeline.read_graph(work.root))
        self._bars: dict[int, TaskID] = {}
        self._told = {record.number for record in records if record.state in SETTLED}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._progress.stop()

    def refresh(self) -> None:
        records = list(self._records)
        self._progress.update(self._whole, completed=sum(record.state in SETTLED for record in records))
        for record in records:
            if record.state == "running":
                self._show(record)
            elif record.number in self._bars:
                self._progress.remove_task(self._bars.pop(record.number))
            if record.state in SETTLED and record.number not in self._told:
                self._told.add(record.number)
                self._progress.console.print(f"{record.name}: {_ending(record)}", markup=False, soft_wrap=True)

    def _show(self, record: Record) -> None:
        if record.number not in self._bars:
            self._bars[record.number] = self._progress.add_task(record.name, total=self._stages)
        states, _ = read_log(log_path(self._work.root, self._work.sweep.name, record))
        now = [stage for stage, state in states.items() if state == "running"]
        self._progress.update(
            self._bars[record.number],
            description=f"{record.name}: {', '.join(now)}" if now else record.name,
            completed=sum(state != "running" for state in states.values()),
        )


def rows(root: Path, sweep: Sweep, records: Sequence[Record], shown: Sequence[str]) -> list[dict[str, Any]]:
    """One row a point: number, name, state, seconds, its settings, and the metrics `shown` (STAGE.KEY); without
    them those that `meta: show` names for the last stages of the graph, where they differ."""
    metrics = {record.number: metrics_of(root, record) for record in records}
    names = list(shown) or _usual(root, list(metrics.values()))
    if sweep.objective and (objective := sweep.objective.partition(":")[0]) not in names:
        names.insert(0, objective)
    return [
        {
            "point": record.number,
            "name": record.name,
            "state": record.state,
            "seconds": round(record.seconds, 1),
            "settings": record.settings,
            "metrics": {name: metrics[record.number].get(name) for name in names},
            "message": record.message,
            "stages": record.stages,
            "commit": record.commit,
        }
        for record in records
    ]


def metrics_of(root: Path, record: Record) -> dict[str, float]:
    """STAGE.KEY → number of the stages that a point has brought up to date."""
    found: dict[str, float] = {}
    for stage, state in record.stages.items():
        if record.commit is not None and state in GOOD:
            text = snapshot.read(root, record.commit, f"metrics/{stage}.json")
            found |= report.flat({stage: json.loads(text)}) if text else {}
    return found


def show(root: Path, sweep: Sweep, found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the rows as a table, then why points failed."""
    settings = grid.differing([row["settings"] for row in found])
    figures = list(found[0]["metrics"]) if found else []
    table = Table("point", *settings, "state", "time", box=None, header_style="bold")
    for name in figures:
        table.add_column(_stacked(name), justify="right", overflow="fold")
    for row in found:
        style = STATES.get(row["state"], "")
        table.add_row(
            str(row["point"]),
            *(_short(row["settings"].get(key)) for key in settings),
            f"[{style}]{row['state']}[/]" if style else row["state"],
            f"{row['seconds']:.1f} s" if row["seconds"] else "",
            *("" if (value := row["metrics"][name]) is None else f"{value:.4g}" for name in figures),
        )
    console.print(table)
    for row in found:
        if row["message"] and row["state"] in ("failed", "pruned"):
            where = log_path(root, sweep.name, Record(row["point"], row["name"], {})).relative_to(root)
            told = f" (all of its output: {where})" if row["state"] == "failed" else ""
            console.print(f"{row['name']} {row['state']}: {row['message']}{told}", markup=False, soft_wrap=True)


def _usual(root: Path, metrics: Sequence[Mapping[str, float]]) -> list[str]:
    graph = pipeline.read_graph(root)
    run = {name for found in metrics for name in (key.partition(".")[0] for key in found)}
    parents = {parent for name in run if name in graph for parent in graph[name].parents}
    names: list[str] = []
    for stage in (name for name in graph if name in run and name not in parents):
        own = [key for found in metrics for key in found if key.startswith(f"{stage}.")]
        wanted = [f"{stage}.{key}" for key in graph[stage].meta.show] or [
            key for key in dict.fromkeys(own) if key.count(".") == 1
        ]
        names += [name for name in wanted if any(name in found for found in metrics)]
    differ = [name for name in names if len({found.get(name) for found in metrics if found}) > 1]
    return (differ or names)[:FIGURES]


def _stacked(name: str) -> str:
    """A name in short lines, parted behind dots and underscores: `ppo.`, `share_of_`, `gain`."""
    lines = [""]
    for part in re.findall(r"[^._]*[._]?", name):
        if len(lines[-1] + part) > HEADER_WIDTH or lines[-1].endswith("."):
            lines.append("")
        lines[-1] += part
    return "\n".join(lines).rstrip()


def _ending(record: Record) -> str:
    if record.state in ("failed", "pruned"):
        return f"{record.state}: {record.message}"
    return f"{record.state} in {record.seconds:.1f} s" if record.state == "done" else record.state


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
