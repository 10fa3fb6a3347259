"""Quantised models beside the dense one, as a page for people and as CSV for plots."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.metrics.report import LABELS, markdown
from tasks.stage.files import new_folder, write_text

SCORES = ("rougeL", "slot_f1", "perplexity", "toxicity_rate")


def write_report(metrics: Mapping[str, Any], answers: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Replace `folder` by a summary with some answers side by side, and the table as CSV."""
    with new_folder(folder) as temporary:
        write_text(temporary / "schemes.csv", _csv(metrics["schemes"]))
        write_text(temporary / "summary.md", _summary(metrics, answers))


def _csv(schemes: Mapping[str, Mapping[str, float]]) -> str:
    columns = sorted({name for row in schemes.values() for name in row})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["scheme", *columns])
    writer.writerows([scheme, *(row.get(name, "") for name in columns)] for scheme, row in schemes.items())
    return text.getvalue()


def _summary(metrics: Mapping[str, Any], answers: Sequence[Mapping[str, str]]) -> str:
    schemes = metrics["schemes"]
    scores = [name for name in SCORES if name in schemes["dense"]]
    rows = [
        (
            name,
            f"{row['bytes'] / 1000:,.0f}",
            f"{row['bytes_ratio']:.3f}",
            *(f"{row[score]:.3f}" for score in scores),
            f"{row['same_answers']:.1%}",
        )
        for name, row in schemes.items()
    ]
    loss = (metrics[f"rougeL_loss{end}"] for end in ("", "_low", "_high"))
    parts = [
        "# Quantisation",
        f"`{metrics['scheme']}` was kept: {metrics['bytes_ratio']:.1%} of the bytes of the dense model's "
        f"{metrics['parameters']:,} parameters, "
        "a loss of {:+.4f} ROUGE-L [{:+.4f}, {:+.4f}].".format(*loss),
        markdown(
            ("scheme", "kB on disk", "of dense", *(LABELS[score] for score in scores), "same answers"), rows
        ),
        f"{metrics['prompts']} held-out prompts, answered greedily. In brackets: the paired 95 % bootstrap "
        "interval. kB are those of the weights' files.",
        "## Answers",
        *("\n".join(f"- {name}: {text}" for name, text in row.items()) for row in answers),
    ]
    return "\n\n".join(parts) + "\n"
