"""Writes that are seen whole or not at all: a temporary name in the same folder, fsync, rename."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8); folders are made as needed."""
    with new_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON: sorted keys, two spaces, a final newline.

    Raises ValueError for NaN and infinities: they are not JSON, and a metric that is NaN is a fault.
    """
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_file(path: Path) -> Iterator[IO[str]]:
    """Open a text file (UTF-8, "\\n") that takes the place of `path` when the block ends well."""
    remove_leftovers(path)
    temporary = _temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `path` when the block ends well.

    A crash leaves the old folder or the new one, never a mixture; between the two renames that a folder needs,
    `path` may be missing.
    """
    remove_leftovers(path)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        if path.exists():
            old = temporary.with_name(temporary.name + "-old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what a killed writer of `path` left behind."""
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def sync_tree(folder: Path) -> None:
    """Bring every file and folder under `folder` to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with (Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")
