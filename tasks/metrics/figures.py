"""The evaluation in pictures: scores with their intervals, every task, and alignment, before and after.

Colours are from Okabe and Ito's palette, which colour-blind readers can tell apart. Same numbers, same bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from tasks.metrics.report import LABELS, TASK_SCORES, Metrics, alignment_parts, present, variants

GREY, BLUE, TUNED = "#999999", "#0072B2", "#E69F00"
OTHERS = (BLUE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
SHOWN = ("rougeL", "bleu", "exact_match", "slot_f1", "toxicity_rate")
ALIGNMENT_SHOWN = ("toxicity_rate", "slot_f1", "rougeL")


def draw_scores(metrics: Metrics, path: Path) -> None:
    """Write a PNG with one panel per score and one bar per baseline (grey) and variant, with 95 % intervals."""
    rows = {**metrics["baselines"], **variants(metrics)}
    colours = [GREY] * len(metrics["baselines"]) + [
        TUNED if name == metrics["about"]["tuned"] else BLUE for name in variants(metrics)
    ]
    shown = present(SHOWN, rows.values())
    with _figure(path, len(shown), height=1.2 + 0.42 * len(rows)) as panels:
        for panel, score in zip(panels, shown, strict=True):
            for place, (scores, colour) in enumerate(zip(rows.values(), colours, strict=True)):
                _bar(panel, place, scores, score, colour, thickness=0.7)
            panel.set_title(LABELS[score])
            panel.set_yticks(range(len(rows)), list(rows))
        panels[0].invert_yaxis()
        panels[0].figure.suptitle(
            f"{metrics['about']['task']}: {metrics['about']['examples']} test examples, 95 % intervals"
        )


def draw_tasks(metrics: Metrics, path: Path) -> None:
    """Write a PNG with one panel per score: for each task one bar per variant, with 95 % intervals."""
    compared: Mapping[str, Any] = metrics["tasks"]
    others = cycle(OTHERS)
    colours = {name: TUNED if name == metrics["about"]["tuned"] else next(others) for name in compared}
    _draw_groups(compared, TASK_SCORES, colours, "Every task, by variant (95 % intervals)", path)


def draw_alignment(metrics: Metrics, path: Path) -> None:
    """Write a PNG of sampled answers before and after alignment, to all prompts and to rude ones.

    Where nothing is compared it says so: the graph lists this file in any case.
    """
    if "alignment" not in metrics:
        with _figure(path, 1, height=1.0) as panels:
            panels[0].set_axis_off()
            panels[0].text(0, 0.5, "Nothing to compare: evaluate.alignment is null.")
        return
    alignment = metrics["alignment"]
    parts = alignment_parts(alignment)
    compared = {
        alignment[side]: {prompts: part[side] for prompts, part in parts.items()}
        for side in ("before", "after")
    }
    colours = dict(zip(compared, (BLUE, TUNED), strict=True))
    title = "Sampled answers before and after alignment (95 % intervals)"
    _draw_groups(compared, ALIGNMENT_SHOWN, colours, title, path)


def _draw_groups(
    compared: Mapping[str, Mapping[str, Mapping[str, float]]],
    scores: Sequence[str],
    colours: Mapping[str, str],
    title: str,
    path: Path,
) -> None:
    """One panel per score, one group of bars per row (a task, a kind of prompt), one bar per variant."""
    from matplotlib.patches import Patch

    rows = list(next(iter(compared.values())))
    shown = present(scores, [found for of_row in compared.values() for found in of_row.values()])
    thickness = 0.8 / len(compared)
    height = 1.6 + 0.32 * len(rows) * len(compared) + 0.15 * len(rows)
    with _figure(path, len(shown), height) as panels:
        for panel, score in zip(panels, shown, strict=True):
            for number, row in enumerate(rows):
                for column, (variant, of_row) in enumerate(compared.items()):
                    place = number + (column - (len(compared) - 1) / 2) * thickness
                    _bar(panel, place, of_row[row], score, colours[variant], thickness * 0.9)
            panel.set_title(LABELS[score])
            panel.set_yticks(range(len(rows)), rows)
        panels[0].invert_yaxis()
        handles = [Patch(color=colour, label=variant) for variant, colour in colours.items()]
        figure = panels[0].figure
        figure.legend(handles=handles, loc="outside lower center", ncols=len(colours), frameon=False)
        figure.suptitle(title)


def _bar(
    panel: Any, place: float, scores: Mapping[str, float], name: str, colour: str, thickness: float
) -> None:
    """One horizontal bar with its interval and its value in words; nothing where there is no such score."""
    if name not in scores:
        return
    value, low, high = (scores[key] for key in (name, f"{name}_low", f"{name}_high"))
    interval = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
    panel.barh(place, value, thickness, color=colour, xerr=interval, ecolor="black", capsize=2)
    panel.text(max(value, high) + 0.03, place, f"{value:.3f}", va="center", fontsize=8)


@contextmanager
def _figure(path: Path, columns: int, height: float) -> Iterator[list[Any]]:
    """Give `columns` panels side by side over 0…1, with common row labels; save them to `path` at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.0 + 2.3 * columns, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
    for panel in panels:
        panel.set_xlim(0, 1.2)
        panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        panel.spines[["top", "right"]].set_visible(False)
    yield panels
    figure.savefig(path, metadata={"Software": None})
