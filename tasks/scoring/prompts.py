"""A file of prompts: JSON lines with a column `prompt`; what else a row has goes along."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tasks.data.sources import Fault, Files, Row, read, shown
from tasks.stage.errors import DataError
from tasks.stage.progress import progress

PROMPT = "prompt"
RESULTS = ("answer", "toxicity", "reward")  # the columns that are added


class Prompts(NamedTuple):
    """A file whose rows are all good: how many they are, and their hash."""

    path: Path
    rows: int
    digest: str


class Part(NamedTuple):
    """Rows that are answered together; `first` counts from 0."""

    first: int
    rows: list[dict[str, Any]]


def checked(path: Path) -> Prompts:
    """Read all of a file once. Raises DataError that names the file and line of the first bad row."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected JSON lines with a column {PROMPT}")
    count, digest = 0, hashlib.sha256()
    with progress(path.stat().st_size, "checking prompts: bytes") as bar:
        for size, rows in _rows(path):
            for row in rows:
                digest.update(json.dumps(row).encode())
            count += len(rows)
            bar.advance(size)
    if not count:
        raise DataError(f"{path}: empty, expected at least one row with a column {PROMPT}")
    return Prompts(path, count, digest.hexdigest())


def parts(prompts: Prompts, size: int, done: int) -> Iterator[Part]:
    """The rows behind the first `done` ones, `size` at a time."""
    rows = islice((row for _, some in _rows(prompts.path) for row in some), done, None)
    while some := list(islice(rows, size)):
        yield Part(done, some)
        done += len(some)


def _rows(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Some rows at a time, and how many bytes were read for them."""
    for chunk in read(
        Files(kind="file", name="prompts", paths=(str(path),), format="jsonl"), 0, frozenset(), 0
    ):
        yield chunk.size, [_checked(path, number, row) for number, row in chunk.numbered()]


def _checked(path: Path, number: int, row: Row | Fault) -> dict[str, Any]:
    fault = row if isinstance(row, Fault) else _fault(row)
    if isinstance(fault, Fault):
        column = "" if fault.column is None else f", column {fault.column}"
        raise DataError(f"{path} line {number}{column}: found {fault.found}, expected {fault.expected}")
    assert not isinstance(row, Fault)
    return dict(row)


def _fault(row: Row) -> Fault | None:
    prompt = row.get(PROMPT)
    if not isinstance(prompt, str) or not prompt.strip():
        found = shown(prompt) if PROMPT in row else "no such column"
        return Fault(PROMPT, found, "text that is not blank")
    if taken := [name for name in RESULTS if name in row]:
        return Fault(taken[0], "a column that the results have", "another name")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Fault(None, "half of a surrogate pair", "text that can be written as UTF-8")
    return None
