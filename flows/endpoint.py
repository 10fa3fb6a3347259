"""A registered version as a web service on this machine alone: `mlflow models serve`, until Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path

from flows import child, server
from flows.processes import end_group
from flows.workspace import child_environment
from tasks.registry import store
from tasks.registry.register import Params
from tasks.stage import tracking
from tasks.stage.errors import TryAgain, UserError, say
from tasks.stage.params import PARAMS_FILE, read_section, read_yaml


def answer(root: Path, wanted: str, port: int) -> None:
    """Answer with the version `wanted` (a number or an alias) until KeyboardInterrupt.

    Raises UserError for an unknown version or a port in use, TryAgain when the server ends by itself.
    """
    if not server.is_free(port):
        raise UserError(f"port {port} is in use: choose another with --port")
    version = store.find(read_section(read_yaml(PARAMS_FILE), "register", Params).name, wanted)
    options = ("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.DEFAULT_STORE
    process = subprocess.Popen(
        child.command("mlflow", "models", "serve", "--model-uri", version.uri, *options),
        cwd=root,
        env=child_environment({"MLFLOW_TRACKING_URI": uri}),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
    )
    try:
        say(f"serving version {version.number} on http://127.0.0.1:{port}/invocations; Ctrl-C ends it")
        process.wait()
        raise TryAgain(f"the server ended by itself with {process.returncode}: its lines above say why")
    except KeyboardInterrupt:
        say("ending it")
    finally:
        end_group(process, seconds=10)
