"""What is told of a reward model, as CSV, a picture and a page; the same numbers give the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.lm.curves import csv_of
from tasks.lm.train import EVALUATION_COLUMNS, LOSS_COLUMNS, Training
from tasks.stage.files import new_folder, write_text

ROWS = {
    "accuracy": "the reward model",
    "accuracy_length_only": "the length alone",
    "accuracy_bag_of_words": "the words alone",
    "accuracy_shuffled": "the same model, labels shuffled",
}
Reliability = Sequence[tuple[float, float, int]]
Kinds = Mapping[str, tuple[float, int]]


def write_report(
    folder: Path,
    metrics: Mapping[str, Any],
    training: Training,
    margin: NDArray[np.float64],
    reliability: Reliability,
    kinds: Kinds,
) -> None:
    """Replace `folder` by the learning curves, what is right by confidence and by kind, plots and a summary."""
    with new_folder(folder) as temporary:
        write_text(temporary / "train.csv", csv_of(LOSS_COLUMNS, training.losses))
        write_text(temporary / "held_out.csv", csv_of(EVALUATION_COLUMNS, training.evaluations))
        write_text(temporary / "calibration.csv", _lines("confidence,accuracy,pairs", reliability))
        by_kind = [(kind, value, pairs) for kind, (value, pairs) in kinds.items()]
        write_text(temporary / "kinds.csv", _lines("kind,accuracy,pairs", by_kind))
        write_text(temporary / "summary.md", _summary(metrics, kinds))
        _plot(temporary / "reward.png", metrics, training, margin, reliability, kinds)


def _lines(header: str, rows: Sequence[Sequence[object]]) -> str:
    return "".join(f"{line}\n" for line in [header, *(",".join(map(str, row)) for row in rows)])


def _summary(metrics: Mapping[str, Any], kinds: Kinds) -> str:
    accuracies = [
        f"| {label} | {metrics[name]:.3f} ({metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f}) |"
        for name, label in ROWS.items()
        if name in metrics
    ]
    return "\n".join(
        [
            "# Reward model",
            "",
            f"{metrics['pairs']} pairs of {metrics['prompts']} held-out prompts. Labels that are known to be "
            f"wrong leave an accuracy of {metrics['accuracy_ceiling']:.3f} to a model that is always right.",
            "",
            "| who tells the preferred completion | accuracy (95 % interval) |",
            "| --- | ---: |",
            *accuracies,
            "",
            f"Where known errors are put right the reward model has {metrics['accuracy_unflipped']:.3f}. "
            f"Expected calibration error: {metrics['calibration_error']:.3f}.",
            "",
            "Pairs whose label is not known to be wrong, by what the other completion is:",
            "",
            "| kind | pairs | accuracy |",
            "| --- | ---: | ---: |",
            *(f"| {kind} | {pairs} | {value:.3f} |" for kind, (value, pairs) in kinds.items()),
            "",
        ]
    )


def _plot(
    path: Path,
    metrics: Mapping[str, Any],
    training: Training,
    margin: NDArray[np.float64],
    reliability: Reliability,
    kinds: Kinds,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    losses, spread, calibrated, of_kinds = figure.subplots(2, 2).flat
    losses.plot(
        [row["step"] for row in training.losses], [row["loss"] for row in training.losses], label="training"
    )
    losses.plot(
        [row["step"] for row in training.evaluations],
        [row["eval_loss"] for row in training.evaluations],
        "o-",
        label="held out",
    )
    losses.set(title="loss", xlabel="step", ylabel="−log σ(margin)")
    losses.legend()
    spread.hist(margin, bins=40)
    spread.axvline(0, color="black", linewidth=1)
    spread.set(
        title="margins of held-out pairs", xlabel="score of the preferred less the other", ylabel="pairs"
    )
    calibrated.plot([0.5, 1], [0.5, 1], color="black", linewidth=1)
    calibrated.plot([each[0] for each in reliability], [each[1] for each in reliability], "o-")
    calibrated.set(
        title=f"calibration (error {metrics['calibration_error']:.3f})", xlabel="confidence", ylabel="accuracy"
    )
    of_kinds.barh(list(kinds), [value for value, _ in kinds.values()])
    of_kinds.axvline(0.5, color="black", linewidth=1)
    of_kinds.set(title="accuracy by kind of the other completion", xlim=(0, 1))
    for axes in (losses, spread, calibrated):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Software": None})
