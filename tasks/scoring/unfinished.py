"""Results that are not all there yet: kept beside the output, so that the same command goes on with the rest.

`.NAME.unfinished` holds whole parts, `.NAME.unfinished.json` how many of its bytes and rows count and what they
are results of. A part counts once it is on the disk.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from tasks.stage.errors import TryAgain
from tasks.stage.files import sync_folder, write_json
from tasks.stage.lock import Lock, holder


class State(NamedTuple):
    """What counts of the unfinished file."""

    fingerprint: str
    rows: int
    bytes: int


class Unfinished:
    """The results of a file of prompts, in their order; `rows` are there already."""

    def __init__(self, output: Path, fingerprint: str, file: IO[bytes], state: State) -> None:
        self._output, self._fingerprint, self._file = output, fingerprint, file
        self.rows = state.rows
        file.truncate(state.bytes)
        file.seek(state.bytes)

    def add(self, lines: bytes, rows: int) -> None:
        """Keep the lines of the next `rows` rows."""
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows += rows
        write_json(_state_path(self._output), State(self._fingerprint, self.rows, self._file.tell())._asdict())

    def finish(self) -> None:
        """All is there: it becomes the output."""
        _path(self._output).replace(self._output)
        sync_folder(self._output.parent)
        _state_path(self._output).unlink(missing_ok=True)


@contextmanager
def unfinished(output: Path, fingerprint: str) -> Iterator[Unfinished]:
    """Go on with what `output` has of `fingerprint`, or begin. Raises TryAgain while another process does."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(_path(output).with_suffix(".lock"))
    if not lock.acquire():
        raise TryAgain(f"{output} is written by process {holder(lock.path)}: wait, or choose another output")
    try:
        path = _path(output)
        path.touch()
        with path.open("r+b") as file:
            yield Unfinished(output, fingerprint, file, _state(output, fingerprint))
    finally:
        lock.path.unlink()
        lock.release()


def _state(output: Path, fingerprint: str) -> State:
    path = _state_path(output)
    if path.exists():
        state = State(**json.loads(path.read_text(encoding="utf-8")))
        if state.fingerprint == fingerprint and _path(output).stat().st_size >= state.bytes:
            return state
    return State(fingerprint, 0, 0)


def _path(output: Path) -> Path:
    return output.with_name(f".{output.name}.unfinished")


def _state_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.unfinished.json")
