"""One workspace: where it is, who may run in it, and what its child processes are told."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tasks.stage.errors import TryAgain, UserError, say
from tasks.stage.lock import Lock, holder

NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
SECONDS_BETWEEN_LOOKS = 0.5


class Busy(TryAgain):
    """Another run has the workspace."""


def find(start: Path) -> Path:
    """The root of the repository that `start` lies in: the folder that holds dvc.yaml and .dvc.

    Raises UserError when there is none.
    """
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / ".dvc").is_dir():
            return folder
    raise UserError(f"no dvc.yaml with a .dvc folder in {start} or above: run this inside the repository")


def prepare(root: Path) -> None:
    """Make the scratch folder, and set this process (and so its children) not to report to anybody.

    DVC unpickles what it finds in its site cache: the folder is closed to other users.
    """
    site_cache = root / ".work" / "dvc"
    site_cache.mkdir(parents=True, exist_ok=True)
    site_cache.chmod(0o700)
    os.environ.update(NO_TELEMETRY, DVC_SITE_CACHE_DIR=str(site_cache))


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: this Python first on the path, `extra`, and nobody else's MLflow run."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": path, **extra}
    environment.pop("MLFLOW_RUN_ID", None)
    return environment


@contextmanager
def locked(root: Path, wait: bool = False) -> Iterator[None]:
    """Keep every other flow out of the workspace while the block runs.

    Raises Busy when one runs already and `wait` is false.
    """
    lock = Lock(lock_path(root))
    waiting = False
    while not lock.acquire():
        owner = holder(lock.path)
        if not wait:
            raise Busy(
                f"another run has this workspace (process {owner}); try again later, or wait with --wait"
            )
        if not waiting:
            waiting = True
            say(f"waiting for the run of process {owner}")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    try:
        yield
    finally:
        lock.release()


def lock_path(root: Path) -> Path:
    """The lock of a workspace; the file holds the id of the process that runs a flow in it."""
    return root / ".work" / "lifecycle.lock"
