"""Where a registered version comes from, and whether it can be made again from there."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from flows import pipeline, workspace
from flows.pipeline import Stage, StageError
from tasks.registry import store
from tasks.registry.register import Params
from tasks.registry.store import Version
from tasks.stage.errors import UserError, say
from tasks.stage.params import PARAMS_FILE, read_section, read_yaml
from tasks.stage.recorder import flat

REQUIREMENTS = "requirements.lock"
CODE = ".py"  # the commit has it


@dataclass(frozen=True)
class Compared:
    """An output, the hash it had when the version was registered, and the one it has now."""

    path: str
    expected: str
    found: str

    @property
    def same(self) -> bool:
        return self.expected == self.found

    def as_json(self) -> dict[str, Any]:
        return {"path": self.path, "expected": self.expected, "found": self.found, "same": self.same}


def look(wanted: str) -> tuple[Version, dict[str, Any]]:
    """The version `wanted` (a number or an alias), and what was recorded when it was registered."""
    name = read_section(read_yaml(PARAMS_FILE), "register", Params).name
    version = store.find(name, wanted)
    return version, json.loads(store.read(version, "lineage.json"))


def record(root: Path, stages: Mapping[str, Stage], git: Mapping[str, str]) -> dict[str, Any]:
    """The commit, and what dvc.lock says of `stages`: commands, params, and the hashes of their outputs and of
    the data that comes from elsewhere."""
    entries = {name: entry for name, entry in pipeline.recorded(root).items() if name in stages}
    recorded = pipeline.recorded_outputs(root)
    outputs = {path: digest for name in entries for path, digest in recorded[name]}
    inputs = {
        dependency["path"]: dependency["md5"]
        for entry in entries.values()
        for dependency in entry.get("deps", [])
        if "md5" in dependency and not (dependency["path"] in outputs or dependency["path"].endswith(CODE))
    }
    return {
        "commit": git["git.commit"],
        "dirty": git["git.dirty"] == "true",
        "commands": {name: stage.command for name, stage in stages.items()},
        "params": {
            name: value
            for entry in entries.values()
            for name, value in entry.get("params", {}).get("params.yaml", {}).items()
        },
        "inputs": dict(sorted(inputs.items())),
        "outputs": dict(sorted(outputs.items())),
    }


def commands(version: str, lineage: Mapping[str, Any]) -> list[str]:
    """The command lines that make the version again in a folder of its own."""
    stages = " ".join(f"--stage {name}" for name in lineage["targets"])
    return [
        f"git worktree add --detach ../rebuild-{version} {lineage['commit']}",
        f"cd ../rebuild-{version}",
        "make setup",
        f".venv/bin/lifecycle run {stages}",
    ]


def show(version: str, aliases: tuple[str, ...], lineage: Mapping[str, Any]) -> None:
    """Print the commit, the params, the hashes and the commands."""
    named = f" ({', '.join(aliases)})" if aliases else ""
    lines = [
        f"version {version}{named}: {lineage['variant']}, made by the stage {lineage['stage']}",
        f"commit  {lineage['commit']}{' with uncommitted changes' if lineage['dirty'] else ''}",
        "",
        "params",
        *(
            f"  {name}: {json.dumps(value, ensure_ascii=False)}"
            for name, value in flat(lineage["params"]).items()
        ),
        "",
        "inputs",
        *(f"  {digest}  {path}" for path, digest in lineage["inputs"].items()),
        "",
        "outputs",
        *(f"  {digest}  {path}" for path, digest in lineage["outputs"].items()),
        "",
        "to make it again (all in one: lifecycle reproduce " + f"{version})",
        *(f"  {command}" for command in commands(version, lineage)),
        *(f"    {name}: {command}" for name, command in lineage["commands"].items()),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def reproduce(root: Path, version: str, lineage: Mapping[str, Any], keep: bool) -> list[Compared]:
    """Check out the commit of a version in a clean folder, run its stages there, and compare the hashes of all
    outputs; DVC's cache of this workspace is not used.

    Raises UserError for a version with uncommitted changes, and when a stage fails.
    """
    if lineage["dirty"]:
        raise UserError(
            f"version {version} was registered with uncommitted changes: no commit has all that made it"
        )
    with _worktree(root, version, lineage["commit"], keep) as folder:
        _warn_of_libraries(root, folder)
        workspace.prepare(folder)
        environment = workspace.child_environment({"LIFECYCLE_TRACKING": "off"})
        graph = pipeline.read_graph(folder)
        for name in (name for name in graph if name in lineage["commands"]):
            say(f"{name}: {graph[name].command}")
            _make(folder, graph[name], environment)
        found = {path: digest for outs in pipeline.recorded_outputs(folder).values() for path, digest in outs}
    return [
        Compared(path, expected, found.get(path, "missing")) for path, expected in lineage["outputs"].items()
    ]


def show_compared(compared: list[Compared]) -> None:
    """Print a line an output, those that differ with both hashes."""
    for entry in compared:
        how = f"same       {entry.expected}" if entry.same else f"different  {entry.expected} → {entry.found}"
        sys.stdout.write(f"{how}  {entry.path}\n")


def _make(folder: Path, stage: Stage, environment: Mapping[str, str]) -> None:
    try:
        pipeline.run_stage(
            folder,
            stage.name,
            force=False,
            environment=environment,
            seconds=stage.meta.timeout,
            stop=Event(),
            tell=say,
        )
    except StageError as error:
        raise UserError(f"{error}; all of its output, with --keep: {error.log}") from None


@contextmanager
def _worktree(root: Path, version: str, commit: str, keep: bool) -> Iterator[Path]:
    folder = root / ".work" / "reproduce" / version
    _remove(root, folder)
    added = _git(root, "worktree", "add", "--quiet", "--detach", str(folder), commit)
    if added.returncode != 0:
        raise UserError(f"commit {commit} of version {version} is not in this repository: `git fetch` it")
    try:
        yield folder
    finally:
        if keep:
            say(f"kept: {folder}")
        else:
            _remove(root, folder)


def _remove(root: Path, folder: Path) -> None:
    """Remove a worktree, also one that a killed run left."""
    shutil.rmtree(folder, ignore_errors=True)
    _git(root, "worktree", "prune")


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)


def _warn_of_libraries(root: Path, folder: Path) -> None:
    """Other versions of the libraries may compute other bytes."""
    texts = [
        path.read_bytes() if path.is_file() else b"" for path in (root / REQUIREMENTS, folder / REQUIREMENTS)
    ]
    if texts[0] != texts[1]:
        say(f"warning: {REQUIREMENTS} of that commit is another than here: bytes may differ for that alone")
