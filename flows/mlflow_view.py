"""The address of MLflow's own page with a comparison made ready: which runs, which columns, which charts.

The page keeps such a view as a tag of the experiment, as its "Share" does, and the address names the tag.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tasks.stage import tracking

USUAL = "http://127.0.0.1:5000"  # of `lifecycle ui`
BARS = 6
SECTION = "comparison"


def note_path(root: Path) -> Path:
    """Where `lifecycle ui` leaves the address of its MLflow."""
    return root / ".work" / "mlflow-server"


def prepare(root: Path, runs: Sequence[str], params: Sequence[str], metrics: Sequence[str]) -> str | None:
    """Keep the view of these pipelines' `runs`, with `params` and `metrics` as columns and charts, and give its
    address; None without runs or without a store. Raises TryAgain when the store does not answer."""
    if not runs:
        return None
    state = view(runs, params, metrics)
    key = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    experiment = tracking.share_view(key, state)
    if experiment is None:
        return None
    return f"{_base(root)}/#/experiments/{experiment}/runs?compareRunsMode=CHART&viewStateShareKey={quote(key)}"


def view(runs: Sequence[str], params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """What MLflow 3 keeps of its runs page. Only `runs` are listed, so no stage's run is among them."""
    listed = ", ".join(f"'{run}'" for run in runs)
    charts = [
        {
            **_chart("PARALLEL", "parallel"),
            "selectedParams": list(params),
            "selectedMetrics": list(metrics[:BARS]),
            "showAllRuns": True,
        },
        *({**_chart("BAR", f"bar-{name}"), "metricKey": name, "displayName": name} for name in metrics[:BARS]),
    ]
    return {
        "searchFilter": f"attributes.run_id IN ({listed})",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [
            *(f"params.`{name}`" for name in params),
            *(f"metrics.`{name}`" for name in metrics),
        ],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts if len(params) + len(metrics) > 1 else charts[1:],
        "compareRunSections": [
            _section(SECTION, "Comparison", display=True),
            _section("model", "Model metrics", display=False),
            _section("system", "System metrics", display=False),
        ],
        "isAccordionReordered": True,
    }


def _chart(kind: str, name: str) -> dict[str, Any]:
    return {
        "uuid": name,
        "type": kind,
        "runsCountToCompare": 100,
        "metricSectionId": SECTION,
        "deleted": False,
        "isGenerated": False,
    }


def _section(name: str, title: str, display: bool) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": title,
        "display": display,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
    }


def _base(root: Path) -> str:
    """The server that runs are sent to, the one of `lifecycle ui`, or where that would be."""
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    if store.startswith(("http://", "https://")):
        return tracking.address().rstrip("/")
    note = note_path(root)
    return note.read_text(encoding="utf-8") if note.is_file() else USUAL
