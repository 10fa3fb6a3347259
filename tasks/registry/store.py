"""MLflow's model registry: versions of one model, their aliases and tags, and what is stored with them.

Which server is asked, and as whom, comes from MLflow's own environment variables alone.
"""

import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.stage.errors import TryAgain, UserError, one_line
from tasks.stage.secrets import redact
from tasks.stage.tracking import DEFAULT_EXPERIMENT, DEFAULT_STORE, address

CHALLENGER = "challenger"
CHAMPION = "champion"
PACKED = "packed"
ANSWERING = Path(__file__).with_name("answering.py")
DESCRIPTION_LENGTH = 5000  # MLflow's own limit
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Version:
    """A registered version of the model `name`."""

    name: str
    number: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """Where MLflow finds it, whatever its aliases become."""
        return f"models:/{self.name}/{self.number}"


def add(
    name: str,
    packed: Path,
    code: Path,
    *,
    example: Sequence[Mapping[str, Any]],
    requirements: Sequence[str],
    description: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> Version:
    """Store the folder `packed` as a new version, with the package in the folder `code` beside it.

    The version becomes the challenger. The run that MLflow wants for it holds `metrics` and `tags`.
    """
    with _asked() as mlflow, redirect_stderr(io.StringIO()):  # it tells of each step
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT))
        with mlflow.start_run(run_name="register", tags=dict(tags)):
            mlflow.log_metrics(dict(metrics))
            stored = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(ANSWERING),
                artifacts={PACKED: str(packed)},
                code_paths=[str(code)],
                pip_requirements=list(requirements),
                input_example=list(example),
                registered_model_name=name,
            )
        number = str(stored.registered_model_version)
        client = mlflow.MlflowClient()
        for key, value in tags.items():
            client.set_model_version_tag(name, number, key, value)
        client.update_model_version(name, number, description[:DESCRIPTION_LENGTH])
        client.set_registered_model_alias(name, CHALLENGER, number)
    return Version(name, number, (CHALLENGER,), dict(tags))


def find(name: str, wanted: str) -> Version:
    """The version of a number or an alias. Raises UserError when there is none."""
    found = look(name, wanted)
    if found is None:
        raise UserError(
            f"the model {name} has no version {wanted} in {address()}; it has {_known(name)}: "
            "`lifecycle register` makes one"
        )
    return found


def look(name: str, wanted: str) -> Version | None:
    """The version of a number or an alias, or None."""
    with _asked() as mlflow:
        from mlflow.exceptions import MlflowException

        client = mlflow.MlflowClient()
        try:
            if not wanted.isdigit():
                wanted = client.get_model_version_by_alias(name, wanted).version
            found = client.get_model_version(name, wanted)
        except MlflowException as error:
            if error.error_code not in GONE:
                raise
            return None
    return Version(name, str(found.version), tuple(found.aliases), dict(found.tags))


def promote(version: Version, over: Version | None, verdicts: str) -> None:
    """Make `version` the champion, and say in its tags over which one and by what verdicts."""
    with _asked() as mlflow:
        client = mlflow.MlflowClient()
        client.set_model_version_tag(version.name, version.number, "promote.verdicts", verdicts)
        client.set_model_version_tag(
            version.name, version.number, "promote.over", over.number if over is not None else "none"
        )
        client.set_registered_model_alias(version.name, CHAMPION, version.number)
        if CHALLENGER in version.aliases:
            client.delete_registered_model_alias(version.name, CHALLENGER)


def read(version: Version, file: str) -> str:
    """The text of a file that is stored with the version."""
    with _asked() as mlflow, tempfile.TemporaryDirectory() as folder:
        uri = f"{version.uri}/artifacts/{PACKED}/{file}"
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)).read_text(
            encoding="utf-8"
        )


def download(version: Version, folder: Path) -> Path:
    """All of the version as MLflow stores it, in `folder`."""
    with _asked() as mlflow:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=version.uri, dst_path=str(folder)))


def _known(name: str) -> str:
    with _asked() as mlflow:
        found = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    return ", ".join(sorted((str(version.version) for version in found), key=int)) or "none"


@contextmanager
def _asked() -> Iterator[Any]:
    """MLflow, at the address of the environment, silent. Raises TryAgain when it does not answer."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE)
            yield mlflow
    except MlflowException as error:
        raise TryAgain(f"the model registry {address()} refuses: {redact(one_line(error))[:300]}") from error
    finally:
        logging.disable(logging.NOTSET)
