"""Bring what a point of a sweep has made into the workspace: params, dvc.lock, metrics, reports, outputs."""

from pathlib import Path

from flows import pipeline, snapshot, sweep
from flows.pipeline import LOCK_FILE
from flows.sweep import Record, Sweep
from tasks.stage.errors import UserError
from tasks.stage.params import PARAMS_FILE


def apply(root: Path, chosen: Sweep, record: Record, force: bool) -> list[str]:
    """Make the workspace what the point was; the branch and its index stay, so `git diff` shows it.

    Returns the stages that are not up to date afterwards, since the code or an input has changed meanwhile.
    Raises UserError when the point is not done, and without `force` when params.yaml has changes of its own or
    an output was never kept by DVC.
    """
    if record.commit is None:
        raise UserError(f"point {record.name} is {record.state}: only one that is done can be applied")
    if not force and not _known(root, chosen):
        raise UserError(
            f"{PARAMS_FILE} has changes that neither git nor the sweep has: commit them, or say --force"
        )
    paths = [str(PARAMS_FILE), LOCK_FILE, *pipeline.uncached_outputs(root)]
    snapshot.bring(root, record.commit, snapshot.files(root, record.commit, paths))
    pipeline.checkout(root, "--allow-missing", *(["--force"] if force else []))
    graph = pipeline.read_graph(root)
    made = [name for name in graph if name in record.stages]
    return [name for name, why in pipeline.changes(root, made).items() if why]


def _known(root: Path, chosen: Sweep) -> bool:
    """Whether params.yaml is that of the last commit, of the workspace as the sweep began, or of any point."""
    text = (root / PARAMS_FILE).read_text(encoding="utf-8")
    commits = [
        "HEAD",
        chosen.base,
        *(record.commit for record in sweep.records(root, chosen.name) if record.commit is not None),
    ]
    return any(snapshot.read(root, commit, str(PARAMS_FILE)) == text for commit in commits)
