"""What every test shares: no telemetry, no network for models, the data of others, a ready MLflow store."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from prefect_server import PrefectServer

QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
}
os.environ.update(QUIET)  # before any library reads them, and inherited by every process a test starts
for name in [
    name for name in os.environ if name.startswith(("MLFLOW_TRACKING", "MLFLOW_RUN", "LIFECYCLE_PARENT"))
]:
    del os.environ[name]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data(repository: Path) -> Path:
    """The folder with the data of others; the test is skipped where it is absent, and fails there under CI."""
    folder = Path(os.environ.get("LIFECYCLE_TEST_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        problem = f"{folder} is missing: set LIFECYCLE_TEST_DATA"
        if "CI" in os.environ:
            pytest.fail(problem)
        pytest.skip(problem)
    return folder


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs. Making one takes seconds: tests copy this file."""

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    script = "import sys; from mlflow import MlflowClient; MlflowClient(sys.argv[1]).search_experiments()"
    subprocess.run([sys.executable, "-c", script, f"sqlite:///{file}"], check=True, capture_output=True)
    return file


@pytest.fixture
def mlflow_store(mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store of this test's own, set in the environment as MLFLOW_TRACKING_URI."""
    file = shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    address = f"sqlite:///{file}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def prefect_server(prefect_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["PrefectServer"]:
    """A Prefect server that the tests share; one that kills it starts it again."""
    from prefect_server import PrefectServer

    with PrefectServer(tmp_path_factory.mktemp("server"), prefect_home) as running:
        yield running


@pytest.fixture
def served(prefect_server: "PrefectServer", monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of that server, which runs use."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server.url)
    return prefect_server.url
