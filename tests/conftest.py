"""What every test shares: no telemetry, no network for models, the data of others, a ready MLflow store."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
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
