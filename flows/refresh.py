"""Look for newer data and models where they come from, and let the params and files here name them.

What `dvc import` and `dvc import-url` brought here is fetched anew when its source has changed. A hub id whose
revision is a branch, or none, gets the newest commit of the branch in params.yaml, so that what ran can be run
again; revisions.json keeps the branch, so that the next refresh finds newer commits. A commit that somebody
else put there stays. Files under inputs/ need no refresh: DVC sees them change. What depends on something new
runs in the next run, and nothing else.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flows import params_file, pipeline
from tasks.stage.errors import TryAgain, one_line
from tasks.stage.files import write_json
from tasks.stage.params import PARAMS_FILE, read_yaml

BRANCHES = Path("revisions.json")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DEFAULT_BRANCH = "main"
SECONDS_TO_ANSWER = 30.0


class Reference(NamedTuple):
    """A hub id in params.yaml: the mapping that holds it, with `revision` as a key."""

    kind: Literal["datasets", "models"]
    id: str
    holder: Any

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.id}"


def refresh(root: Path) -> list[str]:
    """Bring in what is new; a line for each thing that changed.

    Raises UserError when the source of an import cannot be read, TryAgain when the hub does not answer.
    """
    lines = [f"{path}: its source has changed" for path in pipeline.update_imports(root)]
    outputs = {path for stage in pipeline.read_graph(root).values() for path in stage.outputs}
    known = _branches(root)
    branches = followed(references(read_yaml(root / PARAMS_FILE), root, outputs), known)
    newest = {key: newest_commit(key, branch) for key, branch in branches.items()}

    def pin(data: Any) -> None:
        for reference in references(data, root, outputs):
            commit, revision = newest.get(reference.key), reference.holder["revision"]
            if commit not in (None, revision) and followed([reference], known):
                lines.append(f"{reference.id}: {revision or DEFAULT_BRANCH} → {commit}")
                reference.holder["revision"] = commit

    if newest:
        params_file.edit(root, pin)
    if branches != known:
        write_json(root / BRANCHES, branches)
    return lines


def followed(found: Iterable[Reference], known: Mapping[str, str]) -> dict[str, str]:
    """The branch that each hub id follows, by `kind/id`; `known` are those that a refresh has met before."""
    branches = {}
    for reference in found:
        revision = reference.holder["revision"]
        if revision is None or not COMMIT.fullmatch(revision):
            branches[reference.key] = revision or DEFAULT_BRANCH
        elif reference.key in known:
            branches.setdefault(reference.key, known[reference.key])
    return branches


def references(params: Any, root: Path, outputs: set[str]) -> Iterator[Reference]:
    """Every hub id that stands beside a `revision`; not folders, and not what a stage makes (`outputs`)."""
    if isinstance(params, dict):
        if "revision" in params:
            kind: Literal["datasets", "models"] = "datasets" if params.get("kind") == "hub" else "models"
            name = str(params.get("id" if kind == "datasets" else "source", ""))
            if HUB_ID.fullmatch(name) and name not in outputs and not (root / name).exists():
                yield Reference(kind, name, params)
        for value in params.values():
            yield from references(value, root, outputs)
    elif isinstance(params, list):
        for value in params:
            yield from references(value, root, outputs)


def newest_commit(key: str, branch: str) -> str:
    """The commit that a branch of `datasets/ID` or `models/ID` is at on the hub. Raises TryAgain."""
    from huggingface_hub import HfApi

    kind, _, name = key.partition("/")
    try:
        api = HfApi()
        look = api.dataset_info if kind == "datasets" else api.model_info
        return str(look(name, revision=branch, timeout=SECONDS_TO_ANSWER).sha)
    except Exception as error:  # of many kinds: network, names, branches, rights
        raise TryAgain(f"the hub does not say where {branch} of {key} is: {one_line(error)[:200]}") from None


def _branches(root: Path) -> dict[str, str]:
    path = root / BRANCHES
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
