"""Takes the picture of MLflow's comparison in the README: a small sweep in a copy of the repository, its view
in MLflow, a headless Chromium.

    python docs/mlflow_comparison.py [--keep FOLDER]     writes docs/mlflow_comparison.png
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import browser  # noqa: E402 - it lies with the tests

PICTURE = ROOT / "docs" / "mlflow_comparison.png"
SWEEP = (
    "--preset=smoke", "--set=finetune.method=full,lora,ia3", "--set=finetune.schedule.epochs=0.5,2",
    "--stage=finetune", "--name=methods",
)  # fmt: skip
PORT = 5099
WIDTH, HEIGHT = 1700, 1000
SECONDS = 300
COLOURS = 64
# the panel of MLflow's assistant, the note that the view is shared, buttons that lie on the charts
TIDY = """
for (const name of ['assistant.chat_panel.close', 'experiment_page.shared_view.dismiss'])
  document.querySelector(`[data-component-id="mlflow.${name}"]`)?.click();
document.head.insertAdjacentHTML('beforeend', '<style>.modebar { display: none }</style>');
"""
READY = "document.querySelectorAll('.js-plotly-plot .main-svg').length > 2"


def main() -> None:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="make the copy in this folder, and use it if it is there")
    kept = parser.parse_args().keep
    program = browser.found()
    if program is None:
        sys.exit("no Chromium: tests/install_browser installs it")
    with tempfile.TemporaryDirectory() as scratch:
        copy = kept or Path(scratch) / "copy"
        view = compared(copy)
        with mlflow(copy), browser.started(program, Path(scratch)) as page:
            take(page, view.replace(":5000/", f":{PORT}/"))
    sys.stdout.write(f"{PICTURE.relative_to(ROOT)}\n")


def compared(copy: Path) -> str:
    """Run the sweep in the folder `copy` and give the address of its view."""
    if not copy.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    lifecycle(copy, "sweep", *SWEEP)
    metrics = [f"--metric=finetune.{name}" for name in ("loss_after", "trainable_share", "weights_bytes")]
    found = json.loads(lifecycle(copy, "compare", "methods", *metrics, "--json"))
    return str(found["view"])


def lifecycle(copy: Path, *arguments: str) -> str:
    """What a command of the copy prints."""
    names = ("MLFLOW_TRACKING_URI", "LIFECYCLE_TRACKING")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=copy, env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout


@contextmanager
def mlflow(copy: Path) -> Iterator[None]:
    """MLflow's UI of the copy, while the block runs."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", "sqlite:///mlflow.db",
               "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1"]  # fmt: skip
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (copy / ".work" / "mlflow-ui.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=copy, env={**os.environ, **quiet}, stdout=log, stderr=log)
    try:
        end = time.monotonic() + SECONDS
        while not answers(f"http://127.0.0.1:{PORT}/health"):
            if time.monotonic() > end or process.poll() is not None:
                sys.exit(f"MLflow's UI did not start: {log.name}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    """Whether a server is up."""
    try:
        urllib.request.urlopen(url, timeout=10).close()  # noqa: S310
    except OSError:
        return False
    return True


def take(page: browser.Browser, address: str) -> None:
    """Open the view, wait for its charts, and write the picture."""
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    page.call("Page.navigate", url=address)
    end = time.monotonic() + SECONDS
    while not page.ask(READY) and time.monotonic() < end:
        time.sleep(0.5)
    page.ask(TIDY)
    time.sleep(3)  # the charts move into their places
    shot = page.call("Page.captureScreenshot", format="png")
    PICTURE.write_bytes(base64.b64decode(shot["data"]))
    Image.open(PICTURE).quantize(COLOURS).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
