"""The course of a PPO run as CSV, pictures and a page; the same numbers give the same bytes."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.rlhf.course import Course
from tasks.stage.files import new_folder, write_text

PANELS = (
    ("reward", "reward", "a step's answers", "held-out answers"),
    ("kl", "KL to the reference (nats a response)", "a step's answers", "held-out answers"),
    ("gold", "gold score, unseen by the reward", None, "held-out answers"),
    ("toxicity", "share of toxic answers", None, "held-out answers"),
    ("response_tokens", "tokens a response", "a step's answers", "held-out answers"),
    ("entropy", "entropy (nats a token)", "a step's answers", None),
)
EVENT_COLOURS = {"warn": "#E69F00", "raise_beta": "#D55E00", "roll_back": "#CC79A7", "stop": "#000000"}


def write_report(course: Course, metrics: Mapping[str, Any], folder: Path) -> None:
    """Replace `folder` by the curves (CSV), the shown answers (JSON lines), a plot and a summary."""
    with new_folder(folder) as temporary:
        write_text(temporary / "steps.csv", _csv(course.curve))
        write_text(temporary / "held_out.csv", _csv(course.looks))
        lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in course.answers]
        write_text(temporary / "answers.jsonl", "".join(lines))
        write_text(temporary / "summary.md", _summary(course, metrics))
        _plot(course, temporary / "ppo.png")


def _csv(rows: Sequence[Mapping[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _summary(course: Course, metrics: Mapping[str, Any]) -> str:
    def value(name: str) -> str:
        return f"{metrics[name]:.3f} ({metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})"

    if metrics["share_of_gain"] is None:
        share = "Nothing can be gained: the reference's answers to a prompt all get the same reward."
    else:
        share = f"Of the possible gain {value('share_of_gain')} was reached."
    acts = [
        f"- step {each['step']}: {each['act'].replace('_', ' ')}: {each['reasons']}" for each in course.events
    ]
    answers = [
        f"| {row['step']} | {row['answer']} | {row['gold']:.2f} |".replace("\n", " ")
        for row in course.answers
        if row["prompt"] == course.answers[0]["prompt"]
    ]
    return "\n".join(
        [
            "# PPO",
            "",
            f"{metrics['episodes']} episodes in {metrics['steps']} steps; {metrics['stopped_because']}.",
            "",
            "| held-out prompts | before | after |",
            "| --- | ---: | ---: |",
            f"| reward | {metrics['reward_before']:.3f} | {metrics['reward_after']:.3f} |",
            f"| gold score | {metrics['gold_before']:.3f} | {metrics['gold_after']:.3f} |",
            f"| toxic share | {metrics['toxicity_before']:.3f} | {metrics['toxicity_after']:.3f} |",
            f"| KL to the reference (nats) | 0 | {metrics['kl']:.3f} |",
            "",
            f"The objective, reward less {metrics['beta']:g} for each nat: before {value('objective_before')}, "
            f"after {value('objective')}; the best possible, in closed form: {value('objective_optimum')}. "
            f"{share} Intervals are 95 %.",
            "",
            "## The guard",
            "",
            *(acts or ["Nothing to report."]),
            "",
            "## One prompt, step by step",
            "",
            "```",
            course.answers[0]["prompt"],
            "```",
            "",
            "| step | answer | gold |",
            "| ---: | --- | ---: |",
            *answers,
            "",
        ]
    )


def _plot(course: Course, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title, sampled, looked) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        if sampled:
            axes.plot([row["step"] for row in course.curve], [row[name] for row in course.curve], label=sampled)
        if looked:
            axes.plot(
                [row["step"] for row in course.looks], [row[name] for row in course.looks], "o-", label=looked
            )
        for event in course.events:
            axes.axvline(event["step"], color=EVENT_COLOURS[event["act"]], linestyle=":")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    if course.events:
        for act, colour in EVENT_COLOURS.items():
            figure.axes[1].plot([], [], ":", color=colour, label=f"guard: {act.replace('_', ' ')}")
        figure.axes[1].legend()
    figure.savefig(path, metadata={"Software": None})
