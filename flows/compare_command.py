"""What `lifecycle compare` does, in the order in which it does it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows import compare, compare_page, mlflow_view, pipeline, sources
from tasks.stage.errors import TryAgain, UserError, say


def run(root: Path, wanted: Sequence[str], patterns: Sequence[str], quiet: bool) -> dict[str, Any]:
    """Compare, write the page, make MLflow's view ready, and print all of it unless `quiet`.

    Raises UserError when something is not found, or no metric fits `patterns`.
    """
    sides = sources.all_sides(root, wanted)
    names = compare.shown(sides, pipeline.read_graph(root), patterns)
    if patterns and not names:
        raise UserError(f"--metric {' '.join(patterns)}: no two of them have such a metric")
    found = compare.compare(sides, names)
    view = _view(root, found)
    page = compare_page.write(root, found, view)
    if not quiet:
        compare.show(found)
        sys.stdout.write(f"\nto look at: {page.relative_to(root)}\n")
        if view is not None:
            sys.stdout.write(f"in MLflow, while `lifecycle ui` runs: {view}\n")
    return compare.as_json(found) | {"page": str(page.relative_to(root)), "view": view}


def _view(root: Path, found: compare.Comparison) -> str | None:
    runs = [side.run_id for side in found.sides if side.run_id is not None]
    try:
        return mlflow_view.prepare(root, runs, list(found.params), list(found.metrics))
    except TryAgain as error:
        say(f"warning: {error}")
        return None
