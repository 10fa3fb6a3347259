"""The page reports/lifecycle.html: one whole run of the pipeline to look at, in one file.

It asks for nothing from the network and runs no script. It is no output of DVC: it holds times and ids. All
that comes from data is escaped.

    lifecycle report
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flows import charts, findings
from flows import page_parts as parts
from flows.charts import Dot, Line, Span
from flows.findings import Findings, StageFound
from flows.graph_picture import Box, picture
from flows.page_style import STYLE
from flows.report import figures
from tasks.stage.files import write_text
from tasks.stage.params import PARAMS_FILE
from tasks.stage.secrets import redact

PAGE = Path("reports") / "lifecycle.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a browser then fetches nothing
SCORES = {
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "exact_match": "Exact match",
    "slot_f1": "Slot-F1",
    "perplexity": "Perplexity",
    "toxicity_rate": "Toxic answers",
    "length_ratio": "Length ratio",
}
BOXES = {  # state → mark, kind
    "up to date": ("✓", "good"),
    "changed": ("~", "changed"),
    "not here": ("○", "absent"),
    "not run": ("○", "absent"),
    "running": ("▸", "good"),
    "failed": ("✕", "bad"),
    "stopped": ("✕", "bad"),
}
STATES = {
    "up to date": "nothing has changed since it ran",
    "changed": "ran, but code, params or inputs have changed since",
    "not here": "ran, but its files are not in this copy (`dvc pull` or `lifecycle run`)",
    "not run": "has not run yet",
    "running": "runs now",
    "failed": "the last run failed; its numbers are of a run before",
    "stopped": "the last run was stopped; its numbers are of a run before",
}
PPO_CURVES = (
    (
        "Reward",
        "reward",
        (("steps.csv", "reward", "answers of the step"), ("held_out.csv", "reward", "held-out")),
    ),
    (
        "Distance from the reference model",
        "KL (nats an answer)",
        (("steps.csv", "kl", "answers of the step"), ("held_out.csv", "kl", "held-out")),
    ),
    (
        "What the reward does not see, held-out",
        "share, 0 to 1",
        (("held_out.csv", "gold", "gold score"), ("held_out.csv", "toxicity", "toxic answers")),
    ),
    (
        "Length of an answer",
        "tokens",
        (
            ("steps.csv", "response_tokens", "answers of the step"),
            ("held_out.csv", "response_tokens", "held-out"),
        ),
    ),
)
LOSS_CURVES = (
    ("Loss", "loss (nats)", (("train.csv", "loss", "training"), ("held_out.csv", "eval_loss", "held-out"))),
)
SAME_SCORE = 1e-4  # how near two stages' scores of the same model must be for their prompts to be the same
SAMPLES_OPEN = 3


def write(root: Path) -> Path:
    """Write the page of the repository at `root`; gives its path. Raises UserError when dvc.yaml is wrong."""
    path = root / PAGE
    write_text(path, html(findings.look(root)))
    return path


def html(found: Findings) -> str:
    """The whole page."""
    contents: list[tuple[str, str, Callable[[Findings], str]]] = [
        ("journey", "The journey", _journey),
        ("variants", "Every variant on the same test prompts", _variants),
        ("size", "Quality, size and speed", _sizes),
        ("curves", "Learning curves", _curves),
        ("alignment", "Toxic answers before and after alignment", _alignment),
        ("guard", "The guard of PPO", _guard),
        ("samples", "Samples side by side", _samples),
        ("data", "Data card", _data_card),
        ("lineage", "Where it comes from", _lineage),
    ]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in contents)
    sections = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{body(found)}</section>'
        for name, title, body in contents
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>A language model's lifecycle</title><style>{STYLE}</style></head><body>"
        f"<header>{_head(found)}<nav>{links}</nav></header><main>{sections}</main>"
        "<footer><p>Written by <code>lifecycle report</code>. Intervals in square brackets are 95 %. "
        "MB and kB are 10⁶ and 10³ bytes.</p></footer></body></html>\n"
    )


# --- the sections


def _head(found: Findings) -> str:
    commit = f"commit <code>{escape(found.commit[:12])}</code>" if found.commit else "no git commit"
    changed = (
        ", with uncommitted changes" if found.changed else ", no uncommitted changes" if found.commit else ""
    )
    tiles = "".join(
        f'<li><span class="label">{escape(label)}</span><span class="value">{escape(value)}</span>'
        f'<span class="note">{escape(note)}</span></li>'
        for label, value, note in headlines(found)
    )
    return (
        "<h1>A language model's lifecycle</h1>"
        f'<p class="quiet">Written {escape(parts.moment(found.when.isoformat()))} · {commit}{changed}</p>'
        + (f'<ul class="tiles">{tiles}</ul>' if tiles else '<p class="empty">No stage has numbers yet.</p>')
    )


def headlines(found: Findings) -> list[tuple[str, str, str]]:
    """(what, number with its unit, what it stands beside) for the top of the page; only what is known."""
    tiles = []
    evaluation, ppo, reward = (found.metrics.get(name, {}) for name in ("evaluate", "ppo", "reward"))
    alignment = parts.inner(evaluation, "alignment")
    about = parts.inner(evaluation, "about")
    last = str(alignment.get("after") or about.get("tuned") or "")
    scores, base = parts.inner(evaluation, last), parts.inner(evaluation, "base")
    for name, label in (("rougeL", "ROUGE-L"), ("slot_f1", "Slot-F1")):
        if parts.is_number(scores.get(name)):
            beside = f"{parts.interval(scores, name)}".strip()
            if parts.is_number(base.get(name)):
                beside += f"; base {base[name]:.3f}"
            tiles.append((f"{label} of {last}, 0 to 1", f"{scores[name]:.3f}", beside))
    everyone = parts.inner(alignment, "all")
    before, after = parts.inner(everyone, "before"), parts.inner(everyone, "after")
    if parts.is_number(before.get("toxicity_rate")) and parts.is_number(after.get("toxicity_rate")):
        tiles.append(
            (
                "Toxic sampled answers",
                f"{parts.percent(before['toxicity_rate'])} → {parts.percent(after['toxicity_rate'])}",
                f"{alignment.get('before', 'before')} → {alignment.get('after', 'after')}, "
                f"{alignment.get('n', '?')} prompts",
            )
        )
    if parts.is_number(reward.get("accuracy")):
        ceiling = reward.get("accuracy_ceiling")
        beside = f"of {ceiling:.3f} possible, for some labels are flipped" if parts.is_number(ceiling) else ""
        tiles.append(("Accuracy of the reward model", f"{reward['accuracy']:.3f}", beside))
    if parts.is_number(ppo.get("share_of_gain")):
        beside = f"{parts.percents(ppo, 'share_of_gain')} of the possible gain in reward less KL".strip()
        tiles.append(("PPO reached", parts.percent(ppo["share_of_gain"]), beside))
    quantize, distill = found.metrics.get("quantize", {}), found.metrics.get("distill", {})
    if all(parts.is_number(quantize.get(name)) for name in ("bytes", "bytes_ratio", "rougeL", "rougeL_dense")):
        tiles.append(
            (
                f"Quantised, {quantize.get('scheme', '')}",
                f"{parts.storage(quantize['bytes'])}",
                f"{parts.percent(quantize['bytes_ratio'])} of the size; "
                f"ROUGE-L {quantize['rougeL']:.3f}, before {quantize['rougeL_dense']:.3f}",
            )
        )
    if all(
        parts.is_number(distill.get(name))
        for name in ("parameters", "parameters_ratio", "rougeL", "rougeL_teacher")
    ):
        tiles.append(
            (
                "Parameters of the student",
                f"{distill['parameters']:,}",
                f"{parts.percent(distill['parameters_ratio'])} of the teacher's; "
                f"ROUGE-L {distill['rougeL']:.3f}, teacher {distill['rougeL_teacher']:.3f}",
            )
        )
    known = [each.seconds for each in found.stages.values() if each.seconds is not None]
    if known:
        tiles.append(
            (
                "Last runs of all stages",
                parts.duration(sum(known)),
                f"{len(known)} of {len(found.stages)} stages",
            )
        )
    return tiles


def _journey(found: Findings) -> str:
    parents = {name: each.stage.parents for name, each in found.stages.items()}
    boxes = {name: _box(found, each) for name, each in found.stages.items()}
    drawn = "".join(
        picture("The stages and what feeds what", parents, boxes, way) for way in ("across", "down")
    )
    states = {each.state for each in found.stages.values()}
    meaning = "; ".join(
        f"{BOXES[state][0]} {state}: {meant}" for state, meant in STATES.items() if state in states
    )
    why = [
        (name, each.why)
        for name, each in found.stages.items()
        if each.why and each.state in ("changed", "failed", "stopped")
    ]
    reasons = "".join(
        f"<li><strong>{escape(name)}</strong>: {escape(parts.some(reasons))}</li>" for name, reasons in why
    )
    return (
        f'{drawn}<p class="quiet">{parts.code(meaning)}. Seconds are of a stage\'s last run. Arrows that a '
        "longer way says already are left out; every input stands under “Where it comes from”.</p>"
        + (
            f"<details><summary>What has changed or gone wrong</summary><ul>{reasons}</ul></details>"
            if reasons
            else ""
        )
    )


def _box(found: Findings, each: StageFound) -> Box:
    mark, kind = BOXES[each.state]
    time = f" · {parts.duration(each.seconds)}" if each.seconds is not None else ""
    numbers = figures(found.metrics.get(each.stage.name, {}), each.stage.meta.show)
    return Box(f"{each.state}{time}", mark, kind, numbers)


def variants(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The scores of each variant of metrics/evaluate.json."""
    return {
        name: scores
        for name, scores in evaluation.items()
        if isinstance(scores, Mapping) and any(parts.is_number(scores.get(score)) for score in SCORES)
    }


def _variants(found: Findings) -> str:
    evaluation = found.metrics.get("evaluate", {})
    models = variants(evaluation)
    without = variants(parts.inner(evaluation, "baselines"))
    if not models and not without:
        return '<p class="empty">The stage evaluate has no numbers here yet.</p>'
    everyone = [*models.items(), *without.items()]
    names = [name for name in SCORES if any(parts.is_number(scores.get(name)) for _, scores in everyone)]
    body = [
        (
            f"{escape(variant)}{'<small>no model</small>' if number >= len(models) else ''}",
            *(parts.score(scores, name) for name in names),
        )
        for number, (variant, scores) in enumerate(everyone)
    ]
    about = parts.inner(evaluation, "about")
    prompts = (
        f"{about['examples']} test prompts of the task {about.get('task', '')}. " if "examples" in about else ""
    )
    return (
        f"<p>{escape(str(prompts))}All but perplexity and length ratio are from 0 to 1. Perplexity is of the "
        "reference given the prompt, per token: 1 is the best. Length ratio is words of the answer over words "
        "of the reference. Less is better for perplexity and toxic answers. Below each score its interval; "
        "rows without a model come last.</p>"
        + parts.table(("Variant", *(SCORES[name] for name in names)), body, numbers=True, group_at=len(models))
    )


def _sizes(found: Findings) -> str:
    speeds = findings.speeds(found)
    pictures = [
        _size_picture("Variants, test prompts", _variant_dots(found, speeds), "weights on disk (MB)"),
        _size_picture("Smaller models, held-out prompts", _small_dots(found, speeds), "weights on disk (MB)"),
    ]
    shown = "".join(each for each in pictures if each)
    if not shown:
        return '<p class="empty">No variant has both a score and a size here.</p>'
    speed = (
        "A number with × says how fast it answers beside the model it was made from, in tokens/s, as its stage "
        "measured it."
        if speeds
        else "Speeds are known to MLflow alone and not at hand here."
    )
    return (
        "<p>Up and to the left is better. Filled points are the Pareto front: no other has both no more "
        f"bytes and no lower ROUGE-L. An adapter counts with its base. {speed}</p>"
        f'<div class="pair">{shown}</div>'
    )


def _size_picture(title: str, sized: Sequence[tuple[Dot, str, str]], x_label: str) -> str:
    """A figure with the table of its numbers. `sized` has (dot, speed, where the size comes from)."""
    if not sized:
        return ""
    dots = [dot._replace(label=f"{dot.label} {speed}".strip()) for dot, speed, _ in sized]
    front = charts.pareto([(dot.x, dot.y) for dot in dots])
    rows = [
        (
            escape(dot.label),
            f"{dot.x:.3f}",
            f"{dot.y:.3f}<small>{parts.span(dot.low, dot.high)}</small>",
            speed or "–",
            "yes" if number in front else "",
            escape(source),
        )
        for number, (dot, speed, source) in enumerate(sized)
    ]
    table = parts.table(("Model", "MB", "ROUGE-L", "Speed", "Front", "Size from"), rows, numbers=True)
    return (
        f"<figure><h3>{escape(title)}</h3>{charts.scatter(title, x_label, 'ROUGE-L', dots)}"
        f"<details><summary>Numbers</summary>{table}</details></figure>"
    )


def _variant_dots(found: Findings, speeds: Mapping[str, float]) -> list[tuple[Dot, str, str]]:
    settings = parts.inner(parts.inner(found.params, "evaluate"), "variants")
    dots = []
    for name, scores in variants(found.metrics.get("evaluate", {})).items():
        model = str(parts.inner(settings, name).get("model") or name)
        size = findings.size(found, model)
        if size is None or not parts.is_number(scores.get("rougeL")):
            continue
        scheme = found.metrics.get("quantize", {}).get("scheme")
        speed = speeds.get(f"quantize.{scheme}" if model == "quantize" else model)
        dots.append((parts.dot(name, size.bytes, scores), parts.times(speed), size.source))
    return dots


def _small_dots(found: Findings, speeds: Mapping[str, float]) -> list[tuple[Dot, str, str]]:
    """The schemes of quantisation, and the student and the pruned model where they were scored on the same
    prompts: their teacher or dense model has the score that the dense model has there."""
    quantize = found.metrics.get("quantize", {})
    schemes = parts.inner(quantize, "schemes")
    dots = [
        (
            parts.dot(name, scores["bytes"], scores),
            parts.times(speeds.get(f"quantize.{name}")),
            "metrics/quantize.json",
        )
        for name, scores in schemes.items()
        if isinstance(scores, Mapping)
        and parts.is_number(scores.get("bytes"))
        and parts.is_number(scores.get("rougeL"))
    ]
    dense = parts.inner(schemes, "dense").get("rougeL")
    for stage, before in (("distill", "rougeL_teacher"), ("prune", "rougeL_dense")):
        metrics = found.metrics.get(stage, {})
        size = findings.size(found, stage)
        known = parts.is_number(metrics.get(before)) and parts.is_number(metrics.get("rougeL"))
        same = metrics.get("held_out") == quantize.get("prompts")
        if size and known and same and parts.is_number(dense) and abs(metrics[before] - dense) < SAME_SCORE:
            dots.append((parts.dot(stage, size.bytes, metrics), parts.times(speeds.get(stage)), size.source))
    return dots


def _curves(found: Findings) -> str:
    drawn, without = [], []
    for name in found.stages:
        folder = found.root / "reports" / name
        shown = [_curve(folder, name, *each) for each in (PPO_CURVES if name == "ppo" else LOSS_CURVES)]
        if any(shown):
            drawn += shown
        else:
            without.append(name)
    rest = f'<p class="quiet">No curves: {escape(", ".join(without))}.</p>' if without else ""
    return f'<div class="charts">{"".join(drawn)}</div>{rest}'


def _curve(folder: Path, stage: str, title: str, y_label: str, columns: Iterable[tuple[str, str, str]]) -> str:
    """A figure of the columns (file, column, label) that are there; empty when none is."""
    lines = [
        Line(label, found, marked=file == "held_out.csv")
        for file, column, label in columns
        if (found := findings.points(folder / file, column))
    ]
    if not lines:
        return ""
    name = f"{stage}: {title[0].lower()}{title[1:]}"
    return f"<figure><h3>{escape(name)}</h3>{charts.line_chart(name, 'step', y_label, lines)}</figure>"


def _alignment(found: Findings) -> str:
    alignment = parts.inner(found.metrics.get("evaluate", {}), "alignment")
    names = {"all": f"all {alignment.get('n')} prompts", "rude": f"{alignment.get('n_rude')} rude prompts"}
    spans, words = [], []
    for part, prompts in names.items():
        inner = parts.inner(alignment, part)
        for number, when in enumerate(("before", "after")):
            scores = parts.inner(inner, when)
            value, low, high = (scores.get(f"toxicity_rate{end}") for end in ("", "_low", "_high"))
            if parts.is_number(value) and parts.is_number(low) and parts.is_number(high):
                spans.append(Span(f"{alignment.get(when, when)}, {prompts}", value, low, high, number))
        if parts.is_number(inner.get("toxicity_fall")):
            kl = f", at a KL of {inner['kl']:.3f} nats an answer" if parts.is_number(inner.get("kl")) else ""
            fall = f"{parts.percent(inner['toxicity_fall'])}{parts.percents(inner, 'toxicity_fall')}"
            words.append(f"{prompts}: toxic answers fell by {fall}{kl}")
    if not spans:
        return '<p class="empty">Nothing was compared before and after alignment.</p>'
    drawn = charts.intervals("Share of toxic answers", "share of sampled answers that are toxic, 0 to 1", spans)
    return (
        "<p>Answers are sampled here, not greedy as in the table above: greedy answers hide toxicity.</p>"
        f'<div class="pair"><figure>{drawn}</figure><div>'
        f"<ul>{''.join(f'<li>{escape(each)}.</li>' for each in words)}</ul></div></div>"
    )


def _guard(found: Findings) -> str:
    ppo = found.metrics.get("ppo", {})
    if "guard_events" not in ppo:
        return '<p class="empty">The stage ppo has no numbers here yet.</p>'
    events = ppo["guard_events"]
    steps = f" after {ppo['steps']} steps" if "steps" in ppo else ""
    told = (
        "There were no guard events: at every look all held-out numbers kept their limits."
        if not events
        else f"There were {events} guard events."
    )
    ended = f" PPO ended{steps}: {ppo.get('stopped_because', 'no reason recorded')}."
    text = (
        parts.part_of(findings.text(found.root / "reports" / "ppo" / "summary.md"), "The guard")
        if events
        else ""
    )
    return f"<p>{escape(told + ended)}</p>{parts.markdown(text, found.root / 'reports' / 'ppo', found.root)}"


def _samples(found: Findings) -> str:
    samples = findings.lines(found.root / "reports" / "evaluate" / "samples.jsonl")
    if not samples:
        return '<p class="empty">No samples here yet.</p>'
    shown = []
    for number, sample in enumerate(samples):
        prompt, reference = str(sample.get("prompt", "")), str(sample.get("reference", ""))
        answers = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(answer)) or '<i>nothing</i>'}"
            + (' <span class="same">= reference</span>' if str(answer).strip() == reference.strip() else "")
            + "</dd>"
            for name, answer in sample.items()
            if name not in ("prompt", "reference")
        )
        shown.append(
            f"<details{' open' if number < SAMPLES_OPEN else ''}><summary>{number + 1}. "
            f'{escape(parts.cut(reference))}</summary><div class="sample"><pre>{escape(prompt)}</pre><dl>'
            f"<dt>reference</dt><dd>{escape(reference)}</dd>{answers}</dl></div></details>"
        )
    return f"<p>The same test prompt, answered by every variant; {len(samples)} prompts.</p>{''.join(shown)}"


def _data_card(found: Findings) -> str:
    folder = found.root / "reports"
    text = findings.text(folder / "data.md")
    return parts.markdown(text, folder, found.root) if text else '<p class="empty">No data card here yet.</p>'


def _lineage(found: Findings) -> str:
    rows = []
    for name, each in found.stages.items():
        outputs = "<br>".join(
            f"<code>{escape(output.digest)}</code> {escape(output.path)}"
            + (f" ({parts.storage(output.size)})" if output.size is not None else "")
            for output in each.outputs
        )
        ids = "".join(
            f"<br>{label} <code>{escape(value)}</code>"
            for label, value in (("MLflow", each.mlflow_run), ("Prefect", each.flow_run))
            if value
        )
        when = f"{escape(parts.moment(each.ended))}" if each.ended else "–"
        inputs = ", ".join(each.stage.parents) or "nothing before it"
        rows.append((escape(name), escape(inputs), f"{when}{ids}", outputs or "–"))
    flows = sorted({each.flow_run for each in found.stages.values() if each.flow_run})
    known = (
        f" Prefect flow runs: {', '.join(f'<code>{escape(flow)}</code>' for flow in flows)}." if flows else ""
    )
    params = findings.text(found.root / PARAMS_FILE)
    return (
        f"<p>git commit <code>{escape(found.commit) or 'none'}</code>"
        f"{' with uncommitted changes' if found.changed else ''}. Hashes are MD5, as in dvc.lock.{known}</p>"
        + parts.table(("Stage", "Reads from", "Last run ended, ids", "Outputs (hash, path, size)"), rows)
        + (
            f"<details><summary>{escape(str(PARAMS_FILE))}</summary><pre>{escape(redact(params))}</pre></details>"
            if params
            else ""
        )
    )
