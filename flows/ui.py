"""The MLflow and Prefect UIs, served on this machine alone until Ctrl-C."""

import contextlib
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

    The Prefect server of `lifecycle serve` is left to itself. Raises UserError when a port is taken.
    """
    serving = server.noted(root)
    ports = [(mlflow_port, "--mlflow-port"), *([] if serving else [(prefect_port, "--prefect-port")])]
    for port, option in ports:
        if not server.is_free(port):
            raise UserError(f"port {port} is in use: choose another with {option}")
    mlflow_url, prefect_url = f"http://127.0.0.1:{mlflow_port}", f"http://127.0.0.1:{prefect_port}"
    with contextlib.ExitStack() as opened, contextlib.suppress(KeyboardInterrupt):
        processes = [_start_mlflow(root, mlflow_port)]
        opened.callback(end_group, processes[0], seconds=10)
        say("starting (some ten seconds) …")
        if serving is None:
            prefect = server.start(root, prefect_port)
            processes.append(prefect)
            opened.callback(end_group, prefect, seconds=10)
            server.await_start(f"{prefect_url}/api", prefect, Event())
            server.note_path(root).write_text(f"{prefect_url}/api", encoding="utf-8")
            opened.callback(server.note_path(root).unlink, missing_ok=True)
        else:
            prefect_url = serving.removesuffix("/api")
        _await_mlflow(mlflow_url)
        mlflow_view.note_path(root).write_text(mlflow_url, encoding="utf-8")
        opened.callback(mlflow_view.note_path(root).unlink, missing_ok=True)
        sys.stdout.write(f"MLflow   {mlflow_url}\nPrefect  {prefect_url}\nCtrl-C ends this\n")
        sys.stdout.flush()
        while all(process.poll() is None for process in processes):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        raise TryAgain("a server ended by itself: see .work/prefect-server.log and .work/mlflow-server.log")


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
