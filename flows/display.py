"""What is seen of a run: bars on a terminal, plain lines elsewhere, one table at the end.

All but the table goes to stderr.
"""

import re
import time
from types import TracebackType
from typing import Any, Protocol, Self, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from flows import pipeline
from flows.report import as_rows, variants_of
from flows.run import GOOD, Result, Run, State

SECONDS_BETWEEN_LINES = 10.0
LOG_LINES = 15
STATES = get_args(State)
COLOURS = {
    "done": "green",
    "restored": "green",
    "cached": "dim",
    "failed": "red",
    "stopped": "yellow",
    "not run": "yellow",
}


class Display(Protocol):
    """Shows a run while it goes on; `refresh` is called several times a second."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def refresh(self) -> None:
        """Show what is new."""


def display(run: Run, quiet: bool) -> Display:
    """Bars when stderr is a terminal, plain lines when it is not; `quiet` shows plain lines too."""
    console = Console(stderr=True, highlight=False)
    return Bars(run, console) if console.is_terminal and not quiet else Lines(run, console)


class Lines:
    """A line when a stage starts, ends, and every ten seconds between."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self._shown: dict[str, str] = {}
        self._next: dict[str, float] = {}
        self._records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()

    def refresh(self) -> None:
        for name, result in self._run.results.items():
            if self._shown.get(name, "waiting") != result.state:
                self._shown[name] = result.state
                self._next[name] = time.monotonic() + SECONDS_BETWEEN_LINES
                self._console.print(_state_line(result), soft_wrap=True, markup=False)
            elif result.state == "running" and time.monotonic() > self._next[name]:
                self._next[name] = time.monotonic() + SECONDS_BETWEEN_LINES
                record = pipeline.progress_record(self._run.root, name)
                if record and record != self._records.get(name):
                    self._records[name] = record
                    self._console.print(progress_text(record), soft_wrap=True, markup=False)


class Bars:
    """One bar for the pipeline, one for each running stage."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run = run
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._whole = self._progress.add_task("[bold]pipeline", total=len(run.results), figures="")
        self._bars: dict[str, TaskID] = {}
        self._told: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._progress.stop()

    def refresh(self) -> None:
        results = self._run.results.values()
        settled = [result for result in results if result.state not in ("waiting", "running")]
        self._progress.update(self._whole, completed=len(settled))
        for result in results:
            if result.state == "running":
                self._show_bar(result)
            elif result.stage in self._bars:
                self._progress.remove_task(self._bars.pop(result.stage))
        for result in settled:
            if self._told.get(result.stage) != result.state:
                self._told[result.stage] = result.state
                self._progress.console.print(_state_line(result), markup=False, soft_wrap=True)

    def _show_bar(self, result: Result) -> None:
        if result.stage not in self._bars:
            self._bars[result.stage] = self._progress.add_task(result.stage, total=None, figures="")
        record = pipeline.progress_record(self._run.root, result.stage)
        if record:
            self._progress.update(
                self._bars[result.stage],
                description=f"{result.stage}: {record['description']}",
                completed=record["done"],
                total=record["total"],
                figures=_figures(record),
            )


def show_result(run: Run, console: Console) -> None:
    """The result table, the table of model variants if there is one, and why a stage failed."""
    table = Table("stage", "state", "time", "result", title=None, box=None, header_style="bold")
    for row in as_rows(run):
        style = COLOURS.get(row["state"], "")
        seconds = f"{row['seconds']:.1f} s" if row["seconds"] else ""
        table.add_row(
            row["stage"], f"[{style}]{row['state']}[/]" if style else row["state"], seconds, row["result"]
        )
    console.print(table)
    if variants := variants_of(run):
        console.print()
        console.print(variants_table(variants))


def show_failures(run: Run, console: Console) -> None:
    """One line for each stage that failed; of a crash also the end of its output."""
    for result in run.results.values():
        if result.state != "failed":
            continue
        if result.code not in {2, 3, pipeline.TRY_AGAIN} and result.log is not None and result.log.is_file():
            lines = result.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            console.print("\n".join(lines), style="dim", markup=False, soft_wrap=True)
        where = f" (all of its output: {result.log.relative_to(run.root)})" if result.log else ""
        console.print(f"{result.stage} failed: {result.message}{where}", markup=False, soft_wrap=True)


def progress_text(record: dict[str, Any]) -> str:
    """What a stage says of its progress, in words."""
    total = f"/{record['total']}" if record.get("total") else ""
    return f"{record.get('description')} {record.get('done')}{total} {_figures(record)}".rstrip()


def _figures(record: dict[str, Any]) -> str:
    figures = {**record.get("figures", {})}
    now_done = record.get("done", 0) - record.get("before", 0)
    if record.get("total") and now_done:
        left = record["seconds"] / now_done * (record["total"] - record["done"])
        figures = {"left": f"{left:.0f}s", **figures}
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in figures.items()
    )


def read_state_line(line: str) -> tuple[str, str, str] | None:
    """(stage, state, reason of a failure) from a line that `Lines` has printed; None from any other."""
    told = re.fullmatch(rf"([\w-]+): ({'|'.join(STATES)})(?: in [\d.]+ s|: (.*))?", line.strip())
    return (told[1], told[2], told[3] or "") if told else None


def _state_line(result: Result) -> str:
    if result.state == "failed":
        return f"{result.stage}: failed: {result.message}"
    if result.state in GOOD and result.seconds:
        return f"{result.stage}: {result.state} in {result.seconds:.1f} s"
    return f"{result.stage}: {result.state}"


def variants_table(rows: list[dict[str, str]]) -> Table:
    """The rows of `report.variant_rows`, numbers to the right."""
    table = Table(box=None, header_style="bold")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(*row.values())
    return table
