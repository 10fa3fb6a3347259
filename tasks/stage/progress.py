"""A bar with the time left: drawn on a terminal, a line every ten seconds elsewhere, and a small file that a
runner can read to draw the bar itself."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.stage.errors import say

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_FILES = 0.5


class Bar:
    """Counts steps; `done`, `total` and `figures` may be read."""

    def __init__(self, total: int | None, description: str, file: Path | None) -> None:
        self.total = total
        self.description = description
        self.done = 0
        self._before = 0
        self.figures: dict[str, float | str] = {}
        self._file = file
        self._started = self._last_line = time.monotonic()
        self._last_file = 0.0
        self._drawn = _draw(total, description) if sys.stderr.isatty() else None

    def resume(self, done: int) -> None:
        """Begin at what an earlier run has done: it takes no time here."""
        self.done = self._before = done
        if self._drawn is not None:
            self._drawn.reset(self._drawn.task_ids[0], completed=done, figures=self._figures_text())

    def advance(self, n: int = 1, **figures: float | str) -> None:
        """Count `n` more steps and show `figures` (loss=0.3) beside the bar."""
        self.done += n
        self.figures.update(figures)
        now = time.monotonic()
        if self._drawn is not None:
            self._drawn.update(self._drawn.task_ids[0], completed=self.done, figures=self._figures_text())
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            say(self.line(now - self._started))
        if self._file is not None and now - self._last_file >= SECONDS_BETWEEN_FILES:
            self._last_file = now
            self._write(self._file)

    def line(self, seconds: float) -> str:
        """The bar in words, `seconds` after its start: done, total, time left, figures."""
        if self.total is None:
            return f"{self.description}: {self.done} {self._figures_text()}".rstrip()
        now_done = self.done - self._before
        left_text = f", {seconds / now_done * (self.total - self.done):.0f} s left" if now_done else ""
        return f"{self.description}: {self.done}/{self.total}{left_text} {self._figures_text()}".rstrip()

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
        if self._file is not None:
            self._write(self._file)

    def _figures_text(self) -> str:
        return " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.figures.items()
        )

    def _write(self, file: Path) -> None:
        """Replace the file without fsync: it is only looked at while the stage lives."""
        state = {
            "description": self.description,
            "done": self.done,
            "before": self._before,
            "total": self.total,
            "figures": self.figures,
            "seconds": round(time.monotonic() - self._started, 3),
            "pid": os.getpid(),
        }
        temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
        with suppress(OSError):  # a full disk must not end the work for this
            temporary.write_text(json.dumps(state), encoding="utf-8")
            temporary.replace(file)


@contextmanager
def progress(total: int | None, description: str, file: Path | None = None) -> Iterator[Bar]:
    """Show a bar while the block runs; `total` None means that the end is not known."""
    bar = Bar(total, description, file)
    try:
        yield bar
    finally:
        bar.close()


def _draw(total: int | None, description: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    drawn = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
    )
    drawn.add_task(description, total=total, figures="")
    drawn.start()
    return drawn
