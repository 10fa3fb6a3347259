"""Checkpoint folders that prove themselves: a manifest with the SHA-256 of every file, written last.

A folder written by others (a trainer's `checkpoint-500`) is sealed after the fact; an unsealed, truncated or
altered one is never resumed.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.stage.errors import say
from tasks.stage.files import new_folder, remove_leftovers, sync_tree, write_json
from tasks.stage.fingerprint import hash_file

MANIFEST = "manifest.json"


@contextmanager
def save(root: Path, step: int) -> Iterator[Path]:
    """Give an empty folder; when the block ends well it becomes the sealed `root/checkpoint-STEP`."""
    with new_folder(root / f"checkpoint-{step}") as folder:
        yield folder
        seal(folder)


def seal(folder: Path) -> None:
    """Bring a finished checkpoint folder to the disk and write its manifest."""
    remove_leftovers(folder / MANIFEST)
    (folder / MANIFEST).unlink(missing_ok=True)
    sync_tree(folder)
    write_json(folder / MANIFEST, {name: hash_file(folder / name) for name in _files(folder)})


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when it is exactly what was sealed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was never finished"
    except ValueError:
        return f"{MANIFEST} is damaged"
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is damaged"
    files = set(_files(folder))
    if missing := sorted(set(manifest) - files):
        return f"{missing[0]} is missing"
    if added := sorted(files - set(manifest)):
        return f"{added[0]} was not there when it was written"
    for name, expected in manifest.items():
        if hash_file(folder / name) != expected:
            return f"{name} has changed since it was written"
    return None


def newest_verified(root: Path) -> Path | None:
    """The `checkpoint-STEP` folder under `root` of the highest step that is whole; others get a warning."""
    for folder in sorted(_checkpoints(root), key=_step, reverse=True):
        found = problem(folder)
        if found is None:
            return folder
        say(f"warning: checkpoint {folder} is not used: {found}")
    return None


def keep_newest(root: Path, count: int) -> None:
    """Remove all checkpoints under `root` but the `count` of the highest steps."""
    for folder in sorted(_checkpoints(root), key=_step)[:-count]:
        shutil.rmtree(folder)


def remove_others(folder: Path) -> None:
    """Remove the sibling folders of `folder`: checkpoints of other params or inputs."""
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder:
            shutil.rmtree(other)


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    )


def _checkpoints(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]


def _step(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])
