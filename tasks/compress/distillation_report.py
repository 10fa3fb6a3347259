"""What is told of a distillation, as CSV, a picture and a page; the same numbers give the same bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.compress.assess import SCORES
from tasks.lm.curves import csv_of
from tasks.lm.train import EVALUATION_COLUMNS, LOSS_COLUMNS, Training
from tasks.stage.files import new_folder, write_text

ROWS = {
    "_teacher": "teacher",
    "": "student",
    "_taught": "student of few examples, with the teacher",
    "_untaught": "student of few examples, from their references alone",
}


def write_report(folder: Path, metrics: Mapping[str, Any], training: Training) -> None:
    """Replace `folder` by the learning curves, a plot and a summary."""
    with new_folder(folder) as temporary:
        write_text(temporary / "train.csv", csv_of(LOSS_COLUMNS, training.losses))
        write_text(temporary / "held_out.csv", csv_of(EVALUATION_COLUMNS, training.evaluations))
        write_text(temporary / "summary.md", _summary(metrics))
        _plot(temporary / "distill.png", metrics, training)


def _told(metrics: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Who has scores (suffix → who), and which."""
    rows = {suffix: who for suffix, who in ROWS.items() if f"rougeL{suffix}" in metrics}
    return rows, [score for score in SCORES if score in metrics]


def _summary(metrics: Mapping[str, Any]) -> str:
    rows, scores = _told(metrics)
    return "\n".join(
        [
            "# Distillation",
            "",
            f"The student has {metrics['parameters']:,} parameters, {metrics['parameters_ratio']:.1%} of the "
            f"teacher's {metrics['parameters_teacher']:,}. It learnt from {metrics['examples']:,} examples in "
            f"{metrics['steps']:,} steps.",
            "",
            f"Greedy answers to {metrics['held_out']} held-out prompts:",
            "",
            f"| model | {' | '.join(scores)} |",
            f"| --- |{' ---: |' * len(scores)}",
            *(
                f"| {who} | {' | '.join(f'{metrics[score + suffix]:.3f}' for score in scores)} |"
                for suffix, who in rows.items()
            ),
            "",
        ]
    )


def _plot(path: Path, metrics: Mapping[str, Any], training: Training) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    losses, bars = figure.subplots(1, 2)
    for rows, name, label, style in (
        (training.losses, "loss", "training, with the teacher", "-"),
        (training.evaluations, "eval_loss", "held-out labels", "o-"),
    ):
        losses.plot([row["step"] for row in rows], [row[name] for row in rows], style, label=label)
    losses.set(title="distill: loss", xlabel="step", ylabel="loss per token (nats)")
    losses.legend()
    told, scores = _told(metrics)
    height = 0.8 / len(told)
    for number, (suffix, who) in enumerate(told.items()):
        places = [place + number * height for place in range(len(scores))]
        bars.barh(places, [metrics[score + suffix] for score in scores], height, label=who)
    bars.set(title="greedy answers to held-out prompts", xlim=(0, 1))
    bars.set_yticks([place + 0.4 - height / 2 for place in range(len(scores))], scores)
    bars.invert_yaxis()
    bars.legend(fontsize="small")
    for axes in (losses, bars):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Software": None})
