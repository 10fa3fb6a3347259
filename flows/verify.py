"""Hash again what DVC keeps: DVC trusts its cache, and hands out a byte that flipped there."""

import hashlib
import json
import shlex
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from flows import pipeline
from tasks.stage.errors import UserError

DIRECTORY = ".dir"  # the end of the hash of a folder's list of files


@dataclass(frozen=True)
class Fault:
    """A damaged file, what it belongs to, and the command that mends it."""

    path: Path
    problem: str
    belongs_to: tuple[str, ...]
    mend: str

    def as_json(self) -> dict[str, str | list[str]]:
        return {
            "path": str(self.path),
            "problem": self.problem,
            "belongs_to": list(self.belongs_to),
            "mend": self.mend,
        }


@dataclass(frozen=True)
class _Output:
    stage: str
    path: str
    digest: str


def damaged(root: Path) -> list[Fault]:
    """Every cache object that is not what its name says, and every output that is not what dvc.lock says."""
    cache = pipeline.cache_folder(root)
    outputs = [
        _Output(stage, path, digest)
        for stage, found in pipeline.recorded_outputs(root).items()
        for path, digest in found
    ]
    bad_objects = [path for path in _objects(cache) if _hash(path) != _name(path).removesuffix(DIRECTORY)]
    faults = [_object_fault(root, path, cache, outputs) for path in bad_objects]
    bad_names = {_name(path) for path in bad_objects}
    for output in outputs:
        faults += _output_faults(root, output, cache, bad_names)
    return faults


def changed(root: Path, stages: Collection[str]) -> list[str]:
    """The outputs of `stages` whose bytes are not those in dvc.lock; DVC's cache is not asked."""
    return [
        path
        for stage, found in pipeline.recorded_outputs(root).items()
        if stage in stages
        for path, digest in found
        if digest_of(root / path) != digest
    ]


def digest_of(path: Path) -> str | None:
    """The hash that dvc.lock has of a file or a folder, computed from its bytes; None if there is nothing.

    That of a folder is the MD5 of the JSON list of its files, in the order of their names.
    """
    if path.is_file():
        return _hash(path)
    if not path.is_dir():
        return None
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    listed = [{"md5": _hash(path / file), "relpath": file.as_posix()} for file in files]
    text = json.dumps(sorted(listed, key=lambda entry: entry["relpath"]), sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + DIRECTORY


def show(faults: list[Fault]) -> None:
    """Print the faults, each with the command that mends it."""
    for fault in faults:
        owner = f" ({', '.join(fault.belongs_to)})" if fault.belongs_to else ""
        sys.stdout.write(f"{fault.path}{owner}: {fault.problem}\n  mend it:  {fault.mend}\n")
    if not faults:
        sys.stdout.write("every cache object and every output is what its hash says\n")


def _object_fault(root: Path, path: Path, cache: Path, outputs: list[_Output]) -> Fault:
    owners = [output for output in outputs if _name(path) in _parts(cache, output).values()]
    owners += [output for output in outputs if output.digest == _name(path) and output not in owners]
    shown = path.relative_to(root) if path.is_relative_to(root) else path
    remove = f"rm -f {shlex.quote(str(shown))}"
    if not owners:
        return Fault(shown, "the contents do not match the hash", (), remove)
    outs = " ".join(shlex.quote(output.path) for output in owners)
    stages = " ".join(f"--stage {output.stage}" for output in owners)
    return Fault(
        shown,
        "the contents do not match the hash",
        tuple(f"{output.path} of {output.stage}" for output in owners),
        f"{remove} && rm -rf {outs} && lifecycle run {stages}",
    )


def _output_faults(root: Path, output: _Output, cache: Path, bad_names: set[str]) -> Iterator[Fault]:
    for path, digest in _parts(cache, output).items():
        file = root / path
        if digest in bad_names or output.digest in bad_names:
            continue  # told already, and mended together with the object
        if not file.exists():
            problem = "missing"
        elif file.is_file() and _hash(file) != digest:
            problem = "the contents are not those in dvc.lock"
        else:
            continue
        again = f"dvc checkout {shlex.quote(output.path)}" if _object(cache, digest).is_file() else ""
        again = again or f"lifecycle run --stage {output.stage}"
        mend = f"rm -rf {shlex.quote(output.path)} && {again}"
        yield Fault(Path(path), problem, (f"{output.path} of {output.stage}",), mend)


def _parts(cache: Path, output: _Output) -> dict[str, str]:
    """The files of an output, and their hashes; a folder whose list is lost has none."""
    if not output.digest.endswith(DIRECTORY):
        return {output.path: output.digest}
    listed = _object(cache, output.digest)
    try:
        entries = json.loads(listed.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {f"{output.path}/{entry['relpath']}": entry["md5"] for entry in entries}


def _objects(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("[0-9a-f][0-9a-f]/*") if path.is_file() and "." not in path.stem)


def _object(cache: Path, digest: str) -> Path:
    return cache / digest[:2] / digest[2:]


def _name(path: Path) -> str:
    return path.parent.name + path.name


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        try:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
