"""Where a run can be looked at: its MLflow run, its Prefect run, its page."""

import os
from pathlib import Path

from tasks.stage.secrets import redact

LOCAL_MLFLOW = "http://127.0.0.1:5000"  # where `lifecycle ui` shows the local store


def mlflow_run(run_id: str) -> str:
    """The address of an MLflow run: on the tracking server, or in the local UI."""
    store = redact(os.environ.get("MLFLOW_TRACKING_URI", ""))
    base = store.rstrip("/") if store.startswith(("http://", "https://")) else LOCAL_MLFLOW
    return f"{base}/#/runs/{run_id}"


def note(flow_run_url: str, page: Path | None) -> str:
    """What stands at the head of a pipeline's run in MLflow, as markdown."""
    prefect = [f"[Prefect run]({flow_run_url})"] if flow_run_url else []
    report = [f"report: {page.name}, among the artifacts"] if page is not None else []
    return " · ".join([*prefect, *report])
