"""Where people's rankings lie, and a run's patience for them.

What labelers say goes to a journal each (labels/answers); what `feedback` reads is a copy of what holds of them
(inputs/rankings/people.jsonl), which changes only while no run reads it.
"""

import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal

from flows import workspace
from flows.processes import Stopped
from tasks.labels import journal
from tasks.stage.errors import TryAgain, UserError
from tasks.stage.lock import Lock
from tasks.stage.params import PARAMS_FILE, read_yaml

SHEET = Path("labels") / "sheet.json"
ANSWERS = Path("labels") / "answers"
RANKINGS = Path("inputs") / "rankings" / "people.jsonl"
STAGE = "feedback"
SECONDS_BETWEEN_LOOKS = 0.5
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
Late = Literal["stop", "go-on"]


@dataclass(frozen=True)
class Wanted:
    """How many rankings `feedback` waits for, for how many seconds (None: without end), and what then."""

    rankings: int
    seconds: float | None
    late: Late


def duration(text: str) -> float:
    """The seconds of "90s", "30m", "12h" or "2d". Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if found is None:
        raise UserError(f"--deadline {text}: expected a number with s, m, h or d, such as 2d")
    return float(found[1]) * UNITS[found[2]]


def check(root: Path, stages: Collection[str]) -> None:
    """Raise UserError when no stage of a run reads people's rankings: to wait for them would be in vain."""
    if STAGE not in stages:
        raise UserError(f"--wait-for-rankings: {STAGE} is not among the stages of this run")
    match read_yaml(root / PARAMS_FILE):
        case {"feedback": {"source": {"kind": "rankings"}}}:
            return
    raise UserError(
        "--wait-for-rankings: feedback.source does not read people's rankings; add --preset labelled"
    )


def collect(root: Path) -> int:
    """Bring the copy that `feedback` reads up to date; how many rankings it holds."""
    return journal.collect(root / ANSWERS, root / RANKINGS)


def collect_unless_running(root: Path) -> bool:
    """The same, but not while a run has the workspace: DVC would note a file that no stage has read."""
    lock = Lock(workspace.lock_path(root))
    if not lock.acquire():
        return False
    try:
        collect(root)
    finally:
        lock.release()
    return True


def note_path(root: Path) -> Path:
    """Where `lifecycle label` leaves the address of its page."""
    return root / ".work" / "label-page"


def page(root: Path) -> str | None:
    """The address of the page, if it is open."""
    note = note_path(root)
    return note.read_text(encoding="utf-8") if note.is_file() else None


def enough(root: Path, wanted: Wanted) -> bool:
    """Whether there are as many rankings as wanted."""
    return journal.count(root / ANSWERS) >= wanted.rankings


def await_enough(
    root: Path, wanted: Wanted, stop: Event, go_on: Callable[[], bool], tell: Callable[[str], Any]
) -> None:
    """Wait until there are as many rankings as wanted, `go_on` says so, or time is over; then collect them.

    Raises TryAgain when time is over and there are too few, unless the run shall go on then; Stopped once
    `stop` is set.
    """
    end = None if wanted.seconds is None else time.monotonic() + wanted.seconds
    while (there := journal.count(root / ANSWERS)) < wanted.rankings and not go_on():
        if end is not None and time.monotonic() > end:
            if wanted.late == "stop":
                raise TryAgain(
                    f"{there} of {wanted.rankings} rankings are there and the time is over: "
                    "`lifecycle label` for more, then run again"
                )
            tell(f"{STAGE}: the time is over, going on with {there} of {wanted.rankings} rankings")
            break
        if stop.wait(SECONDS_BETWEEN_LOOKS):
            raise Stopped
    collect(root)


def invitation(root: Path, wanted: Wanted) -> str:
    """What is missing, and where people can give it."""
    where = page(root)
    how = f"rank answers at {where}" if where else "rank answers with `lifecycle label`"
    return f"waiting for {wanted.rankings} rankings, {journal.count(root / ANSWERS)} are there: {how}"
