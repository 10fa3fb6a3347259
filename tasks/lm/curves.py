"""Learning curves as CSV and PNG: the same numbers give the same bytes."""

from collections.abc import Sequence
from pathlib import Path

from tasks.lm.train import Row, Training
from tasks.stage.files import new_folder, write_text


def write_curves(folder: Path, training: Training, title: str) -> None:
    """Replace `folder` by `train.csv`, `held_out.csv` and a plot of both, `loss.png`."""
    with new_folder(folder) as temporary:
        write_text(temporary / "train.csv", _csv(training.losses))
        write_text(temporary / "held_out.csv", _csv(training.evaluations))
        _plot(temporary / "loss.png", training, title)


def _csv(rows: Sequence[Row]) -> str:
    lines = (
        [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)] if rows else []
    )
    return "".join(f"{line}\n" for line in lines)


def _plot(path: Path, training: Training, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for rows, name, label, style in (
        (training.losses, "loss", "training", "-"),
        (training.evaluations, "eval_loss", "held out", "o-"),
    ):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], style, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})
