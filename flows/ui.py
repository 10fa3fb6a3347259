"""The MLflow and Prefect UIs, served on this machine alone until Ctrl-C."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from threading import Event

from flows import child, mlflow_view, server
from flows.processes import end_group
from tasks.stage import tracking
from tasks.stage.errors import TryAgain, UserError, say

SECONDS_TO_START = 90
SECONDS_BETWEEN_LOOKS = 0.2


def serve(root: Path, mlflow_port: int, prefect_port: int) -> None:
    """Serve both UIs until KeyboardInterrupt; runs in this workspace use the Prefect server meanwhile.

    Raises UserError when a port is taken.
    """
    for port, option in ((mlflow_port, "--mlflow-port"), (prefect_port, "--prefect-port")):
        if not server.is_free(port):
            raise UserError(f"port {port} is in use: choose another with {option}")
    note = server.note_path(root)
    prefect = server.start(root, prefect_port)
    processes = [prefect, _start_mlflow(root, mlflow_port)]
    try:
        say("starting (some ten seconds) …")
        prefect_url = f"http://127.0.0.1:{prefect_port}"
        mlflow_url = f"http://127.0.0.1:{mlflow_port}"
        server.await_start(f"{prefect_url}/api", prefect, Event())
        note.write_text(f"{prefect_url}/api", encoding="utf-8")
        _await_mlflow(mlflow_url)
        mlflow_view.note_path(root).write_text(mlflow_url, encoding="utf-8")
        sys.stdout.write(f"MLflow   {mlflow_url}\nPrefect  {prefect_url}\nCtrl-C ends both\n")
        sys.stdout.flush()
        while all(process.poll() is None for process in processes):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        raise TryAgain("a server ended by itself: see .work/prefect-server.log and .work/mlflow-server.log")
    except KeyboardInterrupt:
        say("ending both")
    finally:
        note.unlink(missing_ok=True)
        mlflow_view.note_path(root).unlink(missing_ok=True)
        for process in processes:
            end_group(process, seconds=10)


def _start_mlflow(root: Path, port: int) -> subprocess.Popen[bytes]:
    store = os.environ.get("MLFLOW_TRACKING_URI") or tracking.DEFAULT_STORE
    options = ("--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    with (root / ".work" / "mlflow-server.log").open("wb") as output:
        return subprocess.Popen(
            child.command("mlflow", "ui", *options),
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _await_mlflow(url: str) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=3).close()  # noqa: S310
            return
        except OSError:
            if time.monotonic() > end:
                raise TryAgain("the MLflow UI did not start (.work/mlflow-server.log)") from None
            time.sleep(SECONDS_BETWEEN_LOOKS)
