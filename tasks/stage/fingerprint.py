"""What a stage's outputs depend on, as one hash: its command, the contents of its dependencies, its params."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.stage.errors import DataError, UserError
from tasks.stage.params import GRAPH_FILE, PARAMS_FILE, read_yaml, stages_of


def fingerprint(stage: str, root: Path = Path()) -> str:
    """Sixteen hexadecimal digits that change when the stage's `cmd`, `deps` or `params` in dvc.yaml do.

    Raises UserError when dvc.yaml has no such stage, DataError when a dependency is missing.
    """
    stages = stages_of(read_yaml(root / GRAPH_FILE))
    if stage not in stages:
        raise UserError(f"{GRAPH_FILE}: no stage {stage}; it has {', '.join(stages)}")
    definition = stages[stage]
    params = read_yaml(root / PARAMS_FILE)
    names = {stage, *(name for name in definition.get("params", []) if isinstance(name, str))}
    parts = {
        "cmd": definition.get("cmd"),
        "deps": {path: hash_path(root / path) for path in map(_path_of, definition.get("deps", []))},
        "params": {name: _at(params, name) for name in names},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder (bytecode caches left out).

    Raises DataError when there is nothing at `path`.
    """
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise DataError(f"{path} is missing: run the stage that makes it, or `lifecycle run`")
    digest = hashlib.sha256()
    for parent, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            file = Path(parent) / name
            digest.update(f"{file.relative_to(path).as_posix()}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _path_of(entry: str | Mapping[str, Any]) -> str:
    """A dependency in dvc.yaml is a path, or a mapping from the path to options."""
    return entry if isinstance(entry, str) else next(iter(entry))


def _at(params: Mapping[str, Any], dotted: str) -> Any:
    value: Any = params
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
