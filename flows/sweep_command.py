"""What `lifecycle sweep` and `lifecycle apply` do, in the order in which they do it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import grid, pipeline, sweep, sweep_display, workspace
from flows.apply import apply as bring
from flows.run import with_ancestors
from flows.sweep import Grid, Plan, Record, Sweep, Work
from tasks.stage.errors import UserError, say


@dataclass(frozen=True)
class Tried:
    """What the command line says of a sweep."""

    settings: tuple[str, ...]
    presets: tuple[str, ...]
    stages: tuple[str, ...]
    search: tuple[str, ...]
    objective: str
    early: tuple[str, ...]
    trials: int


def run(
    root: Path,
    tried: Tried,
    name: str,
    go_on: str,
    jobs: int,
    shown: Sequence[str],
    keep_trees: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Begin a sweep or go on with one, and run what is missing; gives `exit_code`, `name` and `points`.

    Raises UserError for what cannot be tried, TryAgain when the sweep runs already.
    """
    chosen = sweep.load(root, go_on) if go_on else _begin(root, tried, name)
    with sweep.locked(root, chosen):
        records = sweep.records(root, chosen.name)
        work = Work(root, chosen, _plan(root, chosen, records), jobs, keep_trees)
        total = chosen.trials or len(records)
        say(f"sweep {chosen.name}: {sum(each.state == 'done' for each in records)} of {total} points are done")
        sweep.carry_out(work, sweep_display.display(work, records, total, quiet))
    code = sweep.code_of(records, work.stop.is_set())
    rows = sweep_display.rows(root, chosen, records, shown)
    if not quiet:
        _tell(root, chosen, rows, work.stop.is_set())
    return {"exit_code": code, "name": chosen.name, "points": rows}


def listed(root: Path) -> list[dict[str, Any]]:
    """One entry a sweep: name, what it tries, how many of its points are done."""
    found = []
    for name in sweep.names(root):
        known, records = sweep.load(root, name), sweep.records(root, name)
        found.append(
            {
                "name": name,
                "tries": [*known.settings, *known.search],
                "points": known.trials or len(records),
                "done": sum(record.state == "done" for record in records),
            }
        )
    return found


def show_listed(found: Sequence[dict[str, Any]]) -> None:
    """Print a line a sweep."""
    for entry in found:
        tries = " ".join(entry["tries"])
        sys.stdout.write(f"{entry['name']}  {entry['done']} of {entry['points']} done  {tries}\n")
    if not found:
        say("no sweeps yet")


def remove(root: Path, name: str) -> None:
    """Forget a sweep."""
    sweep.remove(root, name)
    say(f"sweep {name} is removed; what DVC has of it stays in its cache")


def apply(root: Path, wanted: str, force: bool) -> None:
    """Bring the point NAME/POINT into the workspace, and say what is not up to date then."""
    name, slash, which = wanted.partition("/")
    if not slash:
        raise UserError(f"{wanted}: expected NAME/POINT (`lifecycle sweep --list` says which there are)")
    record = sweep.find(root, name, which)
    stale = bring(root, sweep.load(root, name), record, force)
    sys.stdout.write(f"the workspace is now {name}/{record.name}\n")
    if stale:
        say(f"not up to date, code or inputs have changed: {', '.join(stale)}; `lifecycle status` says more")


def _begin(root: Path, tried: Tried, name: str) -> Sweep:
    if not tried.settings and not tried.search:
        raise UserError("nothing to try: say --set SECTION.KEY=VALUE,VALUE, --search, or --continue NAME")
    graph = pipeline.read_graph(root)
    for stage in tried.stages:
        if stage not in graph:
            raise UserError(f"--stage {stage}: no such stage in dvc.yaml; it has {', '.join(graph)}")
    definition = Sweep(
        name=name or _name(tried),
        base="",
        presets=tried.presets,
        settings=tried.settings,
        stages=tried.stages,
        search=tried.search,
        objective=tried.objective,
        early=tried.early,
        trials=tried.trials if tried.search else 0,
    )
    if tried.search:
        from flows import search

        stages = with_ancestors(graph, tried.stages or graph)
        search.check(root, definition, [name for name in graph if name in stages])
    elif tried.objective or tried.early:
        raise UserError("--objective and --early belong to a search: say --search SECTION.KEY=LOW..HIGH too")
    with workspace.locked(root):  # a run would change what the sweep starts from
        return sweep.begin(root, definition, bool(name))


def _name(tried: Tried) -> str:
    """The last parts of the keys that differ."""
    keys = [setting.partition("=")[0] for setting in (*tried.settings, *tried.search)]
    words = "-".join(key.rsplit(".", 1)[-1].replace("_", "-") for key in keys)
    return words[: grid.NAME_LENGTH].strip("-") or "sweep"


def _plan(root: Path, chosen: Sweep, records: list[Record]) -> Plan:
    if chosen.search:
        from flows.search import Search

        return Search(root, chosen, records)
    return Grid(records, list(pipeline.read_graph(root)))


def _tell(root: Path, chosen: Sweep, rows: list[dict[str, Any]], stopped: bool) -> None:
    from rich.console import Console

    sweep_display.show(root, chosen, rows, Console())
    missing = sum(row["state"] not in ("done", "pruned") for row in rows)
    if stopped or missing:
        sys.stdout.write(f"\nto go on with what is missing: lifecycle sweep --continue {chosen.name}\n")
    if any(row["state"] == "done" for row in rows):
        sys.stdout.write(
            f"\nto compare: lifecycle compare {chosen.name}\nto take one: lifecycle apply {chosen.name}/POINT\n"
        )
