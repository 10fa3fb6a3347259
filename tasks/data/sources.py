"""Where rows come from: local files (JSON lines, JSON, CSV, Parquet, plain text), data sets on the hub.

Files are read as a stream, a chunk of about a thousand rows at a time, so that their size does not matter (a
`.json` file is one value and is read whole). JSON lines and plain text are cut here and parsed by whoever takes
the chunk.

A fault of one row is a `Fault` in its place; a fault of a whole file raises DataError.
"""

import csv
import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

from pydantic import Field, StringConstraints

from tasks.stage import DataError, Section

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 64 << 20
ROWS_IN_CHUNK = 1000
BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Format = Literal["jsonl", "json", "csv", "parquet", "txt"]
Row = Mapping[str, Any]


class Files(Section):
    """Local files: `paths` are names or patterns, seen from the root of the repository; `.gz` is unpacked."""

    kind: Literal["file"]
    name: Name
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    format: Format


class Hub(Section):
    """A data set on the Hugging Face hub (or in its local cache), at one exact revision."""

    kind: Literal["hub"]
    name: Name
    id: str
    revision: str
    subset: str | None
    hub_split: str


class Origin(NamedTuple):
    """A file or hub data set: its name in messages, what its rows are counted in, its path if it has one."""

    shown: str
    unit: Literal["line", "row"]
    path: Path | None

    def digest(self) -> str | None:
        """The SHA-256 of the file."""
        if self.path is None:
            return None
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Fault(Exception):  # noqa: N818 - becomes a report, not a traceback
    """What is wrong with a row: the column (None: the row as a whole), what was found, what was expected."""

    def __init__(self, column: str | None, found: str, expected: str) -> None:
        super().__init__(column, found, expected)
        self.column = column
        self.found = found
        self.expected = expected


@dataclass(frozen=True)
class Chunk:
    """Some rows of one origin, in order.

    `source` and `origin` are positions. `rows` are numbered rows, or the undecoded lines of which the first has
    the number `first`. `size` is how many bytes of the file, as it lies on the disk, were read for it.
    """

    source: int
    origin: int
    rows: bytes | Sequence[tuple[int, Row | Fault]]
    first: int = 1
    plain: bool = False
    size: int = 0

    def numbered(self) -> Iterator[tuple[int, Row | Fault]]:
        """(number, row or its fault) of each row; blank lines are left out."""
        if not isinstance(self.rows, bytes):
            yield from self.rows
            return
        for number, line in enumerate(self.rows.split(b"\n"), start=self.first):
            if line and not line.isspace():
                yield number, _plain_row(line) if self.plain else _json_row(line)


def shown(value: Any) -> str:
    """`value` as it would stand in JSON, cut to 60 characters, on one line."""
    if isinstance(value, str):
        value = value[:100]
    text = " ".join(json.dumps(value, ensure_ascii=True, default=str).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def origins(source: Files | Hub) -> list[Origin]:
    """The files that a source names, sorted, or the one data set.

    Raises DataError when a name or pattern fits no file.
    """
    if isinstance(source, Hub):
        return [Origin(f"hub data set {source.id}", "row", None)]
    unit: Literal["line", "row"] = "row" if source.format in ("json", "parquet") else "line"
    found: list[Path] = []
    for pattern in source.paths:
        path = Path(pattern)
        matching = [path]
        if any(sign in pattern for sign in "*?["):
            relative = path.relative_to(path.anchor) if path.anchor else path
            matching = sorted(match for match in Path(path.anchor).glob(str(relative)) if match.is_file())
        if not matching or not matching[0].exists():
            raise DataError(
                f"{pattern}: no such file (source {source.name}); paths start at {Path.cwd().name}/"
            )
        found += (match for match in matching if match not in found)
    return [Origin(path.as_posix(), unit, path) for path in found]


def read(source: Files | Hub, position: int, columns: frozenset[str], longest: int) -> Iterator[Chunk]:
    """The chunks of a source that stands at `position`.

    `columns` are the ones that will be used; `longest` bounds a CSV field, in characters. Raises DataError when
    a file cannot be read as its format or lacks a column.
    """
    for number, origin in enumerate(origins(source)):
        if isinstance(source, Hub):
            yield from _chunked(_hub_rows(source, columns), position, number)
        else:
            assert origin.path is not None
            yield from _file_chunks(origin.path, source.format, position, number, columns, longest)


def _file_chunks(
    path: Path, form: Format, source: int, origin: int, columns: frozenset[str], longest: int
) -> Iterator[Chunk]:
    with _readable(path), path.open("rb") as raw:
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
        match form:
            case "jsonl" | "txt":
                chunks = _line_chunks(file, path, source, origin, plain=form == "txt")
            case "csv":
                chunks = _chunked(_csv_rows(file, path, columns, longest), source, origin)
            case "json":
                chunks = _chunked(_json_rows(file, path), source, origin)
            case "parquet":
                chunks = _chunked(_parquet_rows(file, path, columns), source, origin)
        seen = 0
        for chunk in chunks:
            position = raw.tell()
            yield replace(chunk, size=position - seen)
            seen = position


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in one line what keeps a file from being read."""
    try:
        yield
    except EOFError:
        raise DataError(
            f"{path}: the gzip stream ends too early: the file was cut off; copy it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); copy it again, or drop .gz") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _chunked(rows: Iterator[tuple[int, Row | Fault]], source: int, origin: int) -> Iterator[Chunk]:
    while some := list(itertools.islice(rows, ROWS_IN_CHUNK)):
        yield Chunk(source, origin, some)


def _line_chunks(file: IO[bytes], path: Path, source: int, origin: int, *, plain: bool) -> Iterator[Chunk]:
    """Blocks of whole lines."""
    number, carry = 1, b""
    start = file.read(len(BOM))
    if start[:2] in UTF16_BOMS:
        raise DataError(f"{path}: UTF-16, expected UTF-8; convert it with iconv -f UTF-16 -t UTF-8")
    block = b"" if start == BOM else start
    while block := block + file.read(BLOCK_BYTES):
        whole, end, rest = block.rpartition(b"\n")
        if end:
            lines = carry + whole + end
            yield Chunk(source, origin, lines, number, plain)
            number += lines.count(b"\n")
            carry = b""
        carry += rest
        if len(carry) > LONGEST_LINE:
            raise DataError(f"{path} line {number}: longer than {LONGEST_LINE >> 20} MiB; one record a line?")
        block = b""
    if carry:
        yield Chunk(source, origin, carry, number, plain)


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        raise Fault(None, found, "text in UTF-8") from None


def _plain_row(line: bytes) -> Row | Fault:
    try:
        return {"line": _decoded(line).strip()}
    except Fault as fault:
        return fault


def _json_row(line: bytes) -> Row | Fault:
    try:
        row = json.loads(_decoded(line))
    except Fault as fault:
        return fault
    except json.JSONDecodeError as error:
        return Fault(None, f"{shown(error.doc[error.pos :])} at character {error.colno}", f"JSON ({error.msg})")
    except (ValueError, RecursionError) as error:
        return Fault(None, str(error), "JSON that can be read")
    return row if isinstance(row, dict) else Fault(None, shown(row), "a JSON object")


def _json_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, Row | Fault]]:
    """The elements of the only list in the file: the value itself, or the value of one of its keys."""
    data = file.read()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte 0x{data[error.start]:02x} at {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"{path} line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: expected JSON ({error.msg}); one record a line is format jsonl") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON ({error})") from None
    lists = [value] if isinstance(value, list) else []
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
    if len(lists) != 1:
        what = f"keys {', '.join(value)}" if isinstance(value, dict) else shown(value)
        raise DataError(f"{path}: expected a list of objects, or one key that holds it, found {what[:80]}")
    for number, row in enumerate(lists[0], start=1):
        yield number, row if isinstance(row, dict) else Fault(None, shown(row), "a JSON object")


def _csv_rows(
    file: IO[bytes], path: Path, columns: frozenset[str], longest: int
) -> Iterator[tuple[int, Row | Fault]]:
    csv.field_size_limit(longest)
    # bytes that are not UTF-8 become surrogates: then the row is at fault, not the file
    reader = csv.reader((line.decode(errors="surrogateescape") for line in file), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path} line 1: expected a CSV header ({error})") from None
    if not header:
        return
    header[0] = header[0].removeprefix(BOM.decode())
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path} line 1: column {repeated[0]!r} stands there twice")
    _require(columns, header, path)
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, Fault(None, str(error), "a CSV row (is a quote missing?)")
            continue
        if len(values) == len(header):
            yield number, dict(zip(header, values, strict=True))
        elif values:
            yield number, Fault(None, f"{len(values)} fields", f"{len(header)} fields, as in the header")


def _parquet_rows(file: IO[bytes], path: Path, columns: frozenset[str]) -> Iterator[tuple[int, Row | Fault]]:
    import pyarrow
    import pyarrow.parquet

    number = itertools.count(1)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _require(columns, table.schema_arrow.names, path)
            for batch in table.iter_batches(batch_size=ROWS_IN_CHUNK, columns=sorted(columns)):
                for row in batch.to_pylist():
                    yield next(number), row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]})") from None


def _hub_rows(source: Hub, columns: frozenset[str]) -> Iterator[tuple[int, Row | Fault]]:
    import datasets

    datasets.disable_progress_bars()
    where = f"hub data set {source.id} at revision {source.revision}"
    try:
        table = datasets.load_dataset(
            source.id, source.subset, split=source.hub_split, revision=source.revision
        )
    except Exception as error:  # many kinds: network, names, revisions, formats; all are the user's to mend
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"{where} cannot be loaded: {reason}; check the network and the source {source.name}"
        ) from None
    _require(columns, table.column_names, where)
    number = itertools.count(1)
    for batch in table.select_columns(sorted(columns)).iter(batch_size=ROWS_IN_CHUNK):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield next(number), dict(zip(names, values, strict=True))


def _require(columns: frozenset[str], present: Sequence[str], where: Path | str) -> None:
    if missing := sorted(columns - set(present)):
        raise DataError(f"{where}: column {missing[0]!r} is missing; it has {', '.join(present)[:200]}")
