"""Streams rows into records: read, map, check, hash; in several processes when there are many.

What a chunk becomes depends on the chunk alone, and results are taken in order, so the number of processes
changes nothing. Records go to a spool file; a row keeps about 60 bytes in memory, its signature lies in a file
beside it.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.data.duplicates import FUNCTIONS, Mask, Signatures, repeats, resemblance, signatures
from tasks.data.keys import key, normalise
from tasks.data.recipes import Record
from tasks.data.records import SPLITS
from tasks.data.sources import Chunk, Fault, Origin
from tasks.data.splits import UNPINNED
from tasks.stage import DataError
from tasks.stage.progress import Bar

CHUNKS_HERE = 32  # about 30,000 rows: fewer are done sooner than other processes start
CHUNKS_WAITING = 4  # for each process

ROW = np.dtype(
    [
        ("source", np.uint16),
        ("origin", np.uint32),
        ("number", np.uint32),
        ("task", np.uint16),
        ("pin", np.int8),
        ("id", np.uint64),
        ("content", np.uint64),
        ("scope", np.uint64),
        ("text", np.uint64),
        ("group", np.uint64),
        ("input_words", np.uint32),
        ("output_words", np.uint32),
        ("bytes", np.uint32),
    ]
)
"""What is kept of a row. `content` is the hash of what is asked about what, `scope` of what must be equal for
two rows to be near repeats, `text` of what is compared then."""


class Problem(NamedTuple):
    """A bad row: where it is, the column (None: all of it), what was found, what was expected."""

    source: int
    origin: int
    number: int
    column: str | None
    found: str
    expected: str


@dataclass(frozen=True)
class Batch:
    """What a chunk became: lines, figures [N] and signatures [N, 128] of its good rows, and the bad rows."""

    lines: bytes
    rows: NDArray[np.void]
    tasks: tuple[str, ...]
    signatures: Signatures | None
    problems: list[Problem]
    read: int
    source: int
    size: int


Recorder = Callable[[int, int, int, Any], Record]
"""(source, origin, number, row) -> record; raises Fault."""
InOrder = Callable[[Callable[[Chunk], Batch], Iterator[Chunk]], Generator[Batch]]
"""What each chunk became, in the order of the chunks."""


def convert(record: Recorder, sign: bool, chunk: Chunk) -> Batch:
    """Map, check and hash the rows of a chunk."""
    lines: list[bytes] = []
    rows: list[tuple[int, ...]] = []
    texts: list[str] = []
    tasks: dict[str, int] = {}
    problems: list[Problem] = []
    read = 0
    for number, row in chunk.numbered():
        read += 1
        try:
            if isinstance(row, Fault):
                raise row
            made = record(chunk.source, chunk.origin, number, row)
        except Fault as fault:
            found = Problem(chunk.source, chunk.origin, number, fault.column, fault.found, fault.expected)
            problems.append(found)
            continue
        line = made.line.encode() + b"\n"
        question = normalise(made.question)
        lines.append(line)
        texts.append(made.text)
        rows.append(
            (
                chunk.source,
                chunk.origin,
                number,
                tasks.setdefault(made.task, len(tasks)),
                UNPINNED if made.pin is None else SPLITS.index(made.pin),
                key(made.id),
                key(made.task, question, made.text),
                key(made.task, "" if question == made.text else question),
                key(made.text),
                key(made.group),
                made.input_words,
                made.output_words,
                len(line),
            )
        )
    return Batch(
        lines=b"".join(lines),
        rows=np.array(rows, dtype=ROW),
        tasks=tuple(tasks),
        signatures=signatures(texts) if sign and texts else None,
        problems=problems,
        read=read,
        source=chunk.source,
        size=chunk.size,
    )


def in_order(function: Callable[[Chunk], Batch], chunks: Iterator[Chunk], workers: int) -> Generator[Batch]:
    """`function` of each chunk, in order; here for the first few, then in `workers` processes."""
    yield from map(function, islice(chunks, CHUNKS_HERE))
    following = next(chunks, None)
    if following is None:
        return
    chunks = chain([following], chunks)
    if workers == 1:
        yield from map(function, chunks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow_parent)
    waiting: deque[Future[Batch]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(function, chunk))
            if len(waiting) == workers * CHUNKS_WAITING:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclass
class Corpus:
    """The checked rows of several sources.

    `rows` [N] of dtype ROW; `tasks` are named by the rows' task numbers; `signatures` [N, 128] when asked for;
    `read` and `rejected` count by source. `path` holds the lines, `starts` [N] where each begins.
    """

    path: Path
    rows: NDArray[np.void]
    tasks: list[str]
    signatures: Signatures | None
    read: list[int]
    rejected: list[int]
    starts: NDArray[np.int64] = field(init=False)
    _file: IO[bytes] = field(init=False)

    def __post_init__(self) -> None:
        lengths = self.rows["bytes"].astype(np.int64)
        self.starts = np.cumsum(lengths) - lengths
        self._file = self.path.open("rb")

    def __len__(self) -> int:
        return len(self.rows)

    def close(self) -> None:
        """Remove the files behind the corpus."""
        self._file.close()
        self.signatures = None
        self.path.unlink()
        _signature_file(self.path).unlink(missing_ok=True)

    def record(self, row: int) -> dict[str, Any]:
        """The record of a row."""
        self._file.seek(self.starts[row])
        found: dict[str, Any] = json.loads(self._file.read(int(self.rows["bytes"][row])))
        return found

    def text(self, row: int) -> str:
        """What is compared of a row."""
        record = self.record(row)
        if "text" in record:
            return normalise(record["text"])
        return normalise(record["input"]) or normalise(record["instruction"])

    def resemblance(self, one: int, other: int) -> float:
        """The Jaccard index of the word 5-shingles of two rows."""
        return resemblance(self.text(one), self.text(other))

    def write(self, places: NDArray[np.int8], paths: Sequence[Path]) -> None:
        """Write the line of each row to the path at its place in `places` [N], in order; -1 leaves it out."""
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            lines = stack.enter_context(self.path.open("rb"))
            for line, place in zip(lines, places.tolist(), strict=True):
                if place >= 0:
                    files[place].write(line)

    def count_of_origin(self, source: int, origin: int) -> int:
        """How many rows one file or data set gave."""
        return int(((self.rows["source"] == source) & (self.rows["origin"] == origin)).sum())

    def count(self, rows: Mask, sources: int) -> list[int]:
        """How many of the chosen rows [N] each source gave."""
        return [int(number) for number in np.bincount(self.rows["source"][rows], minlength=sources)]


class Rejects:
    """Bad rows: the first one ends the stage, or each is written down and counted."""

    def __init__(self, origins: Sequence[Sequence[Origin]], file: IO[str], *, skip: bool) -> None:
        self._origins = origins
        self._file = file
        self._skip = skip

    def report(self, problem: Problem) -> None:
        """Raise DataError, or write the problem as a JSON line."""
        origin = self._origins[problem.source][problem.origin]
        column = "" if problem.column is None else f", column {problem.column}"
        if not self._skip:
            raise DataError(
                f"{origin.shown} {origin.unit} {problem.number}{column}: found {problem.found}, "
                f"expected {problem.expected}; mend the row, or set prepare.on_error: skip"
            )
        line = {
            "file": origin.shown,
            origin.unit: problem.number,
            "column": problem.column,
            "found": problem.found,
            "expected": problem.expected,
        }
        self._file.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")


def gather(batches: Generator[Batch], sources: int, rejects: Rejects, path: Path, bar: Bar) -> Corpus:
    """Write the lines of all batches to `path` and keep the figures; `bar` counts the bytes read.

    Raises what `Rejects.report` does for a bad row, a repeated id among them.
    """
    tables: list[NDArray[np.void]] = [np.empty(0, dtype=ROW)]
    tasks: dict[str, int] = {}
    read, rejected = [0] * sources, [0] * sources
    signed = False
    with (
        closing(batches),
        path.open("wb") as lines,
        _signature_file(path).open("wb") as signature_file,
    ):
        for batch in batches:
            for problem in batch.problems:
                rejects.report(problem)
            numbers = [tasks.setdefault(task, len(tasks)) for task in batch.tasks]
            figures = batch.rows.copy()  # Ray's lie in its store and cannot be written to
            if len(figures):
                figures["task"] = np.array(numbers, dtype=np.uint16)[figures["task"]]
            tables.append(figures)
            lines.write(batch.lines)
            if batch.signatures is not None:
                signed = True
                signature_file.write(batch.signatures.tobytes())
            read[batch.source] += batch.read
            rejected[batch.source] += len(batch.problems)
            bar.advance(batch.size, rows=sum(read))
    rows = np.concatenate(tables)
    found = np.memmap(_signature_file(path), np.uint8, "r", shape=(len(rows), FUNCTIONS)) if signed else None
    return Corpus(path, rows, list(tasks), found, read, rejected)


def reject_repeated_ids(corpus: Corpus, rejects: Rejects) -> Mask:
    """Whether each row's id [N] is new; repeated ones are reported and counted."""
    again = repeats(corpus.rows["id"])
    for row in np.flatnonzero(again).tolist():
        figures = corpus.rows[row]
        found = f"{corpus.record(row)['id']}, which an earlier row has"
        rejects.report(
            Problem(
                int(figures["source"]), int(figures["origin"]), int(figures["number"]), "id", found, "a new id"
            )
        )
        corpus.rejected[figures["source"]] += 1
    return ~again


def _signature_file(path: Path) -> Path:
    return path.with_suffix(".signatures")
