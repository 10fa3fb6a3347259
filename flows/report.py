"""What a run did, for people: the result table, the same as markdown, and the table of model variants."""

from collections.abc import Mapping
from typing import Any

from flows import links, pipeline
from flows.run import GOOD, Run, metrics

VARIANT_COLUMNS = {
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "exact_match": "exact",
    "slot_f1": "slot-F1",
    "perplexity": "ppl",
    "toxicity_rate": "toxic",
    "length_ratio": "length",
}
METRICS_SHOWN = 3  # of a stage whose `meta: show` names none


def as_rows(run: Run) -> list[dict[str, Any]]:
    """One row a stage: stage, state, seconds, and metrics or the reason of a failure."""
    return [
        {
            "stage": name,
            "state": result.state,
            "seconds": round(result.seconds, 1),
            "result": result.message or _figures(_metrics(run, name), run.stages[name].meta.show),
        }
        for name, result in run.results.items()
    ]


def variant_rows(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a variant of metrics/evaluate.json, then one a text baseline, with the columns that are there.

    A variant is what has scores of its own: the other parts of that file hold scores one level deeper, or none.
    """
    baselines = evaluation.get("baselines", {})
    found = {
        name: scores
        for name, scores in [*evaluation.items(), *baselines.items()]
        if isinstance(scores, Mapping) and scores.keys() & VARIANT_COLUMNS
    }
    columns = [column for column in VARIANT_COLUMNS if any(column in scores for scores in found.values())]
    return [
        {
            "variant": name,
            **{VARIANT_COLUMNS[each]: f"{scores[each]:.3f}" if each in scores else "" for each in columns},
        }
        for name, scores in found.items()
    ]


def variants_of(run: Run) -> list[dict[str, str]]:
    """The rows of `variant_rows`; none when the run left them as they were before it, for other models."""
    return variant_rows(_metrics(run, "evaluate"))


def _metrics(run: Run, name: str) -> dict[str, Any]:
    """Those of a stage that is up to date; what lies there of one that never came to run is of other inputs."""
    result = run.results.get(name)
    return metrics(run.root, name) if result and result.state in GOOD else {}


def as_markdown(run: Run) -> str:
    """The run in short, as markdown."""
    parts = [f"# {run.title}", _table(as_rows(run))]
    if variants := variants_of(run):
        parts.append(_table(variants))
    if found := mlflow_runs(run):
        parts.append("MLflow: " + " · ".join(f"[{name}]({url})" for name, url in found.items()))
    return "\n\n".join(parts) + "\n"


def mlflow_runs(run: Run) -> dict[str, str]:
    """The addresses of the MLflow runs: that of this run, and of each stage the one that made what is there."""
    ids = {name: pipeline.exit_record(run.root, name).get("mlflow_run_id") for name in run.stages}
    found = {"this run": run.mlflow_id, **ids}
    return {name: links.mlflow_run(run_id) for name, run_id in found.items() if run_id}


def _table(rows: list[dict[str, Any]]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[column]) for column in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def figures(found: Mapping[str, Any], names: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, value) of `names` (dotted) among the metrics, or of the first few numbers."""
    known = flat(found)
    shown = names or [name for name in known if "." not in name][:METRICS_SHOWN]
    return [(name, _number(known[name])) for name in shown if name in known]


def _figures(found: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return " ".join(f"{name}={value}" for name, value in figures(found, names))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, int | float]:
    """The numbers among nested values, with dotted names."""
    found: dict[str, int | float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = value
    return found


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
