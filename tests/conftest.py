"""What every test shares: no telemetry, no network for models, the data of others, ready stores, one order."""

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from browser import Browser
    from prefect_server import PrefectServer

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
    "TORCHDYNAMO_DISABLE": "1",  # nothing here compiles, and the compiler takes two seconds to import
}
os.environ.update(QUIET)  # before any library reads them, and inherited by every process a test starts
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every one of those would compile the project anew
sys.dont_write_bytecode = False
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
for name in [
    name for name in os.environ if name.startswith(("MLFLOW_TRACKING", "MLFLOW_RUN", "LIFECYCLE_PARENT"))
]:
    del os.environ[name]

gc.set_threshold(100_000, 50, 100)  # looking for garbage as often as usual is a tenth of the tests' work

SLOWEST = (  # begun first, so that no worker is left alone with one of them at the end
    "test_flows_lifecycle.py",
    "test_presets.py",
    "test_processes.py",
    "test_infra_stack.py",
    "test_ray.py",
    "test_flows_sweep.py",
    "test_reward.py",
    "test_distill.py",
    "test_finetune.py",
    "test_stage_tracking.py",
    "test_flows_page.py",
    "test_flows_serve.py",
    "test_evaluate.py",
    "test_stage_warm.py",
    "test_lm_train.py",
    "test_flows_faults.py",
    "test_prune.py",
    "test_flows_cli.py",
    "test_lm_engine.py",
    "test_ppo.py",
    "test_register.py",
    "test_prepare.py",
    "test_rlhf_trainer.py",
    "test_base.py",
    "test_flows_register.py",
    "test_flows_chat.py",
    "test_stage_run.py",
    "test_quantize.py",
    "test_flows_label.py",
    "test_stage_faults.py",
    "test_flows_plan.py",
    "test_real_data.py",
    "test_flows_pipeline.py",
    "test_planning.py",
    "test_lm_peft.py",
    "test_flows_rankings.py",
    "test_rlhf_policy.py",
    "test_feedback.py",
    "test_lineage.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay together: what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


def pytest_collection_finish() -> None:
    """The libraries stay: whoever collects garbage, as each training does, need not look through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def figures_as_they_come() -> Iterator[None]:
    """A figure that is drawn in this process is drawn once, with nothing moved into place: half the work.

    What the stages' own processes draw is what users see.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def savefig(figure: Figure, path: Path, metadata: dict[str, str | None]) -> None:
        figure.set_layout_engine("none")
        FigureCanvasAgg(figure).print_png(path, metadata=metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`make_once(name, make)`: a folder that the first worker to ask has had filled by `make(folder)`."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make_once(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                unfinished = folder.with_suffix(".unfinished")
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return make_once


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


def run_forked(*command: str, **environment: str) -> None:
    """Run `python -m ...` to its good end, forked from the process that has its libraries."""
    import command_host

    done = command_host.run([sys.executable, "-m", *command], Path.cwd(), {**os.environ, **environment})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def mlflow_template(make_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """An MLflow store without runs. Making one takes seconds: tests copy this file."""

    def make(folder: Path) -> None:
        run_forked("mlflow", "experiments", "search", MLFLOW_TRACKING_URI=f"sqlite:///{folder / 'mlflow.db'}")

    return make_once("mlflow", make) / "mlflow.db"


@pytest.fixture(scope="session")
def prefect_template(make_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A PREFECT_HOME without runs. A server takes ten seconds to make its tables: tests copy this folder."""

    def make(folder: Path) -> None:
        run_forked("prefect", "server", "database", "upgrade", "--yes", PREFECT_HOME=str(folder))

    return make_once("prefect", make)


@pytest.fixture
def mlflow_store(mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store of this test's own, set in the environment as MLFLOW_TRACKING_URI."""
    file = shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    address = f"sqlite:///{file}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.fixture(scope="session")
def prefect_home(prefect_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PREFECT_HOME that the tests share."""
    return Path(shutil.copytree(prefect_template, tmp_path_factory.mktemp("home") / "prefect"))


@pytest.fixture(scope="module")
def prefect_server(prefect_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["PrefectServer"]:
    """A Prefect server that the tests of a file share (idle it takes a thirtieth of a core); one that kills it
    starts it again."""
    from prefect_server import PrefectServer

    with PrefectServer(tmp_path_factory.mktemp("server"), prefect_home) as running:
        yield running


@pytest.fixture
def served(prefect_server: "PrefectServer", monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of that server, which runs use."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server.url)
    return prefect_server.url


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Browser"]:
    """A Chromium for the tests of a file."""
    import browser

    program = browser.found()
    if program is None:
        problem = "no Chromium here: tests/install_browser installs one on Debian, for root"
        if "CI" in os.environ:
            pytest.fail(problem)
        pytest.skip(problem)
    with browser.started(program, tmp_path_factory.mktemp("chromium")) as started:
        yield started
