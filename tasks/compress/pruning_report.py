"""What is told of pruning, as CSV, a picture and a page; the same numbers give the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.compress.assess import SCORES
from tasks.lm.curves import csv_of
from tasks.stage.files import new_folder, write_text

Rows = Sequence[dict[str, Any]]
WHO = {"_dense": "dense", "_before_recovery": "pruned", "": "pruned and tuned"}


def write_report(folder: Path, params: Mapping[str, Any], metrics: Mapping[str, Any], rows: Rows) -> None:
    """Replace `folder` by the comparison of methods, patterns and sparsities (`rows`), a plot and a summary."""
    with new_folder(folder) as temporary:
        write_text(temporary / "sweep.csv", csv_of(list(rows[0]), rows))
        write_text(temporary / "summary.md", _summary(params, metrics, rows))
        _plot(temporary / "prune.png", metrics, rows)


def _columns(metrics: Mapping[str, Any]) -> list[str]:
    return [*(score for score in SCORES if score in metrics), "loss"]


def _summary(params: Mapping[str, Any], metrics: Mapping[str, Any], rows: Rows) -> str:
    columns = _columns(metrics)
    title = f"| {' | '.join(columns)} |"
    line = f"|{' ---: |' * len(columns)}"
    who = WHO if params["recovery"] else {"_dense": "dense", "": "pruned"}
    return "\n".join(
        [
            "# Pruning",
            "",
            f"By {params['method']}, {params['pattern']}: {metrics['sparsity']:.1%} of the weights went; "
            f"{metrics['parameters_not_zero']:,} of {metrics['parameters_dense']:,} parameters are not zero. "
            f"The weights take {metrics['bytes_ratio']:.1%} of the room they took: zeros are stored like other "
            "numbers; only whole heads and channels that go make a model smaller.",
            "",
            f"Greedy answers to {metrics['held_out']} held-out prompts, and the loss (nats a token) of the "
            "dense model's answers to them:",
            "",
            f"| model {title}",
            f"| --- {line}",
            *(
                f"| {name} | {' | '.join(f'{metrics[column + suffix]:.3f}' for column in columns)} |"
                for suffix, name in who.items()
            ),
            "",
            f"## Methods side by side, without tuning, on {params['sweep']['prompts']} of the prompts",
            "",
            f"| method | pattern | sparsity {title}",
            f"| --- | --- | ---: {line}",
            *(
                f"| {row['method']} | {row['pattern']} | {row['sparsity']:.0%} | "
                f"{' | '.join(f'{row[column]:.3f}' for column in columns)} |"
                for row in rows
            ),
            "",
        ]
    )


def _plot(path: Path, metrics: Mapping[str, Any], rows: Rows) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [column for column in _columns(metrics) if column in ("rougeL", "slot_f1", "loss")]
    figure = Figure(figsize=(5 * len(columns), 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    lines = list(dict.fromkeys((row["method"], row["pattern"]) for row in rows))
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        for method, pattern in lines:
            points = [row for row in rows if (row["method"], row["pattern"]) == (method, pattern)]
            axes.plot(
                [row["sparsity"] for row in points],
                [row[column] for row in points],
                "o-" if method == "wanda" else "s--",
                label=f"{method}, {pattern}",
            )
        axes.axhline(metrics[f"{column}_dense"], color="black", linewidth=1, label="dense")
        axes.set(title=column, xlabel="sparsity", yscale="log" if column == "loss" else "linear")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, metadata={"Software": None})
