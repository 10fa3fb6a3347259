"""Learning curves as CSV and PNG: the same numbers give the same bytes."""

from collections.abc import Sequence
from pathlib import Path

from tasks.lm.train import EVALUATION_COLUMNS, LOSS_COLUMNS, Row
from tasks.stage.files import new_folder, write_text


def write_curves(folder: Path, losses: Sequence[Row], evaluations: Sequence[Row], title: str) -> None:
    """Replace `folder` by `train.csv`, `held_out.csv` and a plot of both, `loss.png`."""
    with new_folder(folder) as temporary:
        write_text(temporary / "train.csv", csv_of(LOSS_COLUMNS, losses))
        write_text(temporary / "held_out.csv", csv_of(EVALUATION_COLUMNS, evaluations))
        _plot(temporary / "loss.png", losses, evaluations, title)


def csv_of(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """The rows as CSV."""
    lines = [",".join(columns), *(",".join(str(row[column]) for column in columns) for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def _plot(path: Path, losses: Sequence[Row], evaluations: Sequence[Row], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for rows, name, label, style in (
        (losses, "loss", "training", "-"),
        (evaluations, "eval_loss", "held out", "o-"),
    ):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], style, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})
