"""metrics/evaluate.json as tables for people (Markdown) and for plots (CSV)."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Metrics = Mapping[str, Any]

NOT_VARIANTS = ("about", "alignment", "baselines", "decoding", "differences", "splits", "tasks")
LABELS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "exact_match": "Exact match",
    "slot_f1": "Slot-F1",
    "perplexity": "Perplexity",
    "toxicity_rate": "Toxic answers",
    "toxicity_mean": "Toxicity",
    "length_ratio": "Length ratio",
    "distinct_2": "Distinct-2",
    "reward": "Reward",
}
TASK_SCORES = ("exact_match", "rougeL", "slot_f1")
WITH_INTERVAL = ("rougeL", "slot_f1")
ALIGNMENT_SCORES = ("toxicity_rate", "toxicity_mean", "slot_f1", "rougeL", "length_ratio", "reward")


def variants(metrics: Metrics) -> dict[str, Mapping[str, float]]:
    """The scores of each model variant."""
    return {name: scores for name, scores in metrics.items() if name not in NOT_VARIANTS}


def scores_table(metrics: Metrics) -> str:
    """Baselines and variants by score, with 95 % intervals for ROUGE-L and slot-F1."""
    names = ("rouge1", "rouge2", "rougeL", "bleu", "exact_match", "slot_f1", "perplexity", "toxicity_rate")
    return _scores_by_row("Variant", {**metrics["baselines"], **variants(metrics)}, names)


def decoding_table(metrics: Metrics) -> str:
    """Decoding settings of the tuned variant by score."""
    names = ("rougeL", "bleu", "exact_match", "slot_f1", "toxicity_rate", "length_ratio", "distinct_2")
    return _scores_by_row("Decoding", metrics["decoding"], names)


def splits_table(metrics: Metrics) -> str:
    """Each variant on forms and facts seen in training, and on those that only the test split has."""
    rows = {
        f"{variant}, {part.replace('_', '-')}": scores
        for variant, parts in metrics["splits"].items()
        for part, scores in parts.items()
    }
    return _scores_by_row("Variant, examples", rows, TASK_SCORES)


def tasks_table(metrics: Metrics) -> str:
    """Every task's scores, the variants side by side: what tuning gained, and what it forgot."""
    compared = list(metrics["tasks"])
    header = ("Task", "Score", *compared)
    rows = [
        (task, LABELS[score], *(_number(metrics["tasks"][variant][task], score) for variant in compared))
        for task in metrics["tasks"][compared[0]]
        for score in TASK_SCORES
        if score in metrics["tasks"][compared[0]][task]
    ]
    return markdown(header, rows)


def differences_table(metrics: Metrics) -> str:
    """The tuned variant minus every other and every baseline, paired over the same examples."""
    names = present(WITH_INTERVAL, metrics["differences"].values())
    header = (f"{metrics['about']['tuned']} minus", *(LABELS[name] for name in names))
    rows = [
        (other, *(_interval(scores, name, sign="+") for name in names))
        for other, scores in metrics["differences"].items()
    ]
    return markdown(header, rows)


def alignment_parts(alignment: Metrics) -> dict[str, Mapping[str, Any]]:
    """The parts of `alignment` by what they say: all prompts, and those that are rude."""
    named = {"all": f"all {alignment['n']} prompts", "rude": f"{alignment['n_rude']} rude prompts"}
    return {name: alignment[part] for part, name in named.items() if part in alignment}


def alignment_table(metrics: Metrics) -> str:
    """Sampled answers before and after alignment, with the paired difference."""
    alignment = metrics["alignment"]
    rows = [
        (
            prompts,
            LABELS[score],
            _interval(part["before"], score),
            _interval(part["after"], score),
            _interval(part["difference"], score, sign="+"),
        )
        for prompts, part in alignment_parts(alignment).items()
        for score in present(ALIGNMENT_SCORES, [part["after"]])
    ]
    return markdown(("Prompts", "Score", alignment["before"], alignment["after"], "Difference"), rows)


def alignment_sentence(metrics: Metrics) -> str:
    """What alignment did to toxicity, and how far it moved the model."""
    alignment = metrics["alignment"]
    prompts, part = list(alignment_parts(alignment).items())[-1]
    rates = [part[side]["toxicity_rate"] for side in ("before", "after")]
    fall = ""
    if "toxicity_fall" in part:
        ends = (part[f"toxicity_fall{end}"] for end in ("", "_low", "_high"))
        fall = ", a fall of {:.0%} [{:.0%}, {:.0%}]".format(*ends)
    return (
        f"On {prompts} `{alignment['before']}` is toxic in {rates[0]:.1%} of its sampled answers, "
        f"`{alignment['after']}` in {rates[1]:.1%}{fall}, at a KL divergence of {_interval(part, 'kl')} nats "
        "per answer."
    )


def summary(metrics: Metrics) -> str:
    """The whole evaluation on one page of Markdown."""
    about = metrics["about"]
    parts = [
        f"# Evaluation: {about['task']}\n",
        f"{about['examples']} test examples. In brackets: 95 % bootstrap intervals. "
        f"BLEU: `{about['bleu_signature']}`.\n",
        scores_table(metrics),
        "\n## Differences (paired bootstrap)\n",
        differences_table(metrics),
        "\n## Every task, before and after tuning\n",
        tasks_table(metrics),
        "\n## Decoding settings\n",
        f"{about['decoding_examples']} prompts, variant `{about['tuned']}`.\n",
        decoding_table(metrics),
    ]
    if metrics["splits"]:
        parts += ["\n## Seen and held-out\n", splits_table(metrics)]
    if "alignment" in metrics:
        parts += ["\n## Alignment\n", alignment_sentence(metrics) + "\n", alignment_table(metrics)]
    return "\n".join(parts) + "\n"


def scores_csv(metrics: Metrics) -> str:
    """One line per baseline and variant, one column per number: what `dvc plots` draws."""
    rows = {**metrics["baselines"], **variants(metrics)}
    columns = sorted({name for scores in rows.values() for name in scores})
    return _csv(
        ("variant", *columns),
        [(variant, *(scores.get(name, "") for name in columns)) for variant, scores in rows.items()],
    )


def tasks_csv(metrics: Metrics) -> str:
    """One line per variant and task."""
    return _csv(
        ("variant_task", "variant", "task", *TASK_SCORES),
        [
            (f"{task}, {variant}", variant, task, *(scores.get(name, "") for name in TASK_SCORES))
            for variant, tasks in metrics["tasks"].items()
            for task, scores in tasks.items()
        ],
    )


def decoding_csv(metrics: Metrics) -> str:
    """One line per decoding setting."""
    columns = sorted({name for scores in metrics["decoding"].values() for name in scores})
    return _csv(
        ("setting", *columns),
        [(name, *(scores[column] for column in columns)) for name, scores in metrics["decoding"].items()],
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def present(names: Iterable[str], rows: Iterable[Mapping[str, float]]) -> list[str]:
    """The names that at least one row has."""
    known = {name for row in rows for name in row}
    return [name for name in names if name in known]


def _scores_by_row(what: str, rows: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str:
    names = present(names, rows.values())
    lines = [
        (row, *((_interval if name in WITH_INTERVAL else _number)(scores, name) for name in names))
        for row, scores in rows.items()
    ]
    return markdown((what, *(LABELS[name] for name in names)), lines)


def _number(scores: Mapping[str, float], name: str) -> str:
    return f"{scores[name]:.3f}" if name in scores else "–"


def _interval(scores: Mapping[str, float], name: str, sign: str = "") -> str:
    if name not in scores:
        return "–"
    return f"{scores[name]:{sign}.3f} [{scores[f'{name}_low']:{sign}.3f}, {scores[f'{name}_high']:{sign}.3f}]"


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
