"""What a run in a work tree of a sweep knows: which point it is, and that its stages may run elsewhere too."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from flows.processes import Stopped
from tasks.stage.errors import say
from tasks.stage.files import write_json
from tasks.stage.fingerprint import fingerprint
from tasks.stage.lock import Lock

FILE = Path(".work") / "point.json"
SECONDS_BETWEEN_TRIES = 0.2
SECONDS_UNTIL_TOLD = 1.0


@dataclass(frozen=True)
class Point:
    """One variant of a sweep. `settings` are dotted params; `locks` is the folder of the sweep's stage locks;
    `early` says that this run is only to see whether the rest is worth it."""

    sweep: str
    number: int
    name: str
    settings: Mapping[str, Any]
    locks: str
    early: bool = False

    @property
    def title(self) -> str:
        return f"{self.sweep}/{self.name}" + (" (early)" if self.early else "")

    @property
    def tags(self) -> dict[str, str]:
        """What its runs in MLflow are found by."""
        return {
            "sweep": self.sweep,
            "sweep.point": self.name,
            "sweep.number": str(self.number),
            "sweep.early": str(self.early).lower(),
        } | {f"set.{key}": str(value) for key, value in self.settings.items()}


def write(folder: Path, point: Point) -> None:
    """Tell the runs in `folder` which point they are."""
    write_json(folder / FILE, asdict(point))


def read(root: Path) -> Point | None:
    """The point that the workspace `root` is; None when it is no sweep's."""
    path = root / FILE
    return Point(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


@contextmanager
def once(point: Point | None, stage: str, root: Path, stop: Event) -> Iterator[None]:
    """Keep other points out of a stage of the same command, inputs and params while the block runs: those that
    waited find its outputs in the cache. Raises Stopped once `stop` is set."""
    if point is None:
        yield
        return
    lock = Lock(Path(point.locks) / f"{stage}-{fingerprint(stage, root)}")
    started, told = time.monotonic(), False
    while not lock.acquire():
        if not told and time.monotonic() - started > SECONDS_UNTIL_TOLD:
            told = True
            say(f"{stage}: waiting for another point that runs the same")
        if stop.wait(SECONDS_BETWEEN_TRIES):
            raise Stopped
    try:
        yield
    finally:
        lock.release()
