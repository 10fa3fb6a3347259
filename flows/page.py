"""The page reports/lifecycle.html: one whole run of the pipeline to look at, in one file.

It asks for nothing from the network and runs no script. It is no output of DVC: it holds times and ids. All
that comes from data is escaped.

    lifecycle report
"""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from flows import charts, findings
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
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}


def write(root: Path) -> Path:
    """Write the page of the repository at `root`; gives its path. Raises UserError when dvc.yaml is wrong."""
    path = root / PAGE
    write_text(path, html(findings.look(root)))
    return path


def html(found: Findings) -> str:
    """The whole page."""
    parts: list[tuple[str, str, Callable[[Findings], str]]] = [
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
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in parts)
    sections = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{body(found)}</section>' for name, title, body in parts
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
        f'<p class="quiet">Written {escape(_time(found.when.isoformat()))} · {commit}{changed}</p>'
        + (f'<ul class="tiles">{tiles}</ul>' if tiles else '<p class="empty">No stage has numbers yet.</p>')
    )


def headlines(found: Findings) -> list[tuple[str, str, str]]:
    """(what, number with its unit, what it stands beside) for the top of the page; only what is known."""
    tiles = []
    evaluation, ppo, reward = (found.metrics.get(name, {}) for name in ("evaluate", "ppo", "reward"))
    alignment = _inner(evaluation, "alignment")
    about = _inner(evaluation, "about")
    last = str(alignment.get("after") or about.get("tuned") or "")
    scores, base = _inner(evaluation, last), _inner(evaluation, "base")
    for name, label in (("rougeL", "ROUGE-L"), ("slot_f1", "Slot-F1")):
        if _is_number(scores.get(name)):
            beside = f"{_interval(scores, name)}".strip()
            if _is_number(base.get(name)):
                beside += f"; base {base[name]:.3f}"
            tiles.append((f"{label} of {last}, 0 to 1", f"{scores[name]:.3f}", beside))
    everyone = _inner(alignment, "all")
    before, after = _inner(everyone, "before"), _inner(everyone, "after")
    if _is_number(before.get("toxicity_rate")) and _is_number(after.get("toxicity_rate")):
        tiles.append(
            (
                "Toxic sampled answers",
                f"{_percent(before['toxicity_rate'])} → {_percent(after['toxicity_rate'])}",
                f"{alignment.get('before', 'before')} → {alignment.get('after', 'after')}, "
                f"{alignment.get('n', '?')} prompts",
            )
        )
    if _is_number(reward.get("accuracy")):
        ceiling = reward.get("accuracy_ceiling")
        beside = f"of {ceiling:.3f} possible, for some labels are flipped" if _is_number(ceiling) else ""
        tiles.append(("Accuracy of the reward model", f"{reward['accuracy']:.3f}", beside))
    if _is_number(ppo.get("share_of_gain")):
        beside = f"{_percents(ppo, 'share_of_gain')} of the possible gain in reward less KL".strip()
        tiles.append(("PPO reached", _percent(ppo["share_of_gain"]), beside))
    quantize, distill = found.metrics.get("quantize", {}), found.metrics.get("distill", {})
    if all(_is_number(quantize.get(name)) for name in ("bytes", "bytes_ratio", "rougeL", "rougeL_dense")):
        tiles.append(
            (
                f"Quantised, {quantize.get('scheme', '')}",
                f"{_bytes(quantize['bytes'])}",
                f"{_percent(quantize['bytes_ratio'])} of the size; "
                f"ROUGE-L {quantize['rougeL']:.3f}, before {quantize['rougeL_dense']:.3f}",
            )
        )
    if all(
        _is_number(distill.get(name)) for name in ("parameters", "parameters_ratio", "rougeL", "rougeL_teacher")
    ):
        tiles.append(
            (
                "Parameters of the student",
                f"{distill['parameters']:,}",
                f"{_percent(distill['parameters_ratio'])} of the teacher's; "
                f"ROUGE-L {distill['rougeL']:.3f}, teacher {distill['rougeL_teacher']:.3f}",
            )
        )
    known = [each.seconds for each in found.stages.values() if each.seconds is not None]
    if known:
        tiles.append(
            ("Last runs of all stages", _duration(sum(known)), f"{len(known)} of {len(found.stages)} stages")
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
        f"<li><strong>{escape(name)}</strong>: {escape(_some(reasons))}</li>" for name, reasons in why
    )
    return (
        f'{drawn}<p class="quiet">{_code(meaning)}. Seconds are of a stage\'s last run. Arrows that a longer '
        "way says already are left out; every input stands under “Where it comes from”.</p>"
        + (
            f"<details><summary>What has changed or gone wrong</summary><ul>{reasons}</ul></details>"
            if reasons
            else ""
        )
    )


def _box(found: Findings, each: StageFound) -> Box:
    mark, kind = BOXES[each.state]
    time = f" · {_duration(each.seconds)}" if each.seconds is not None else ""
    numbers = figures(found.metrics.get(each.stage.name, {}), each.stage.meta.show)
    return Box(f"{each.state}{time}", mark, kind, numbers)


def variants(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The scores of each variant of metrics/evaluate.json."""
    return {
        name: scores
        for name, scores in evaluation.items()
        if isinstance(scores, Mapping) and any(_is_number(scores.get(score)) for score in SCORES)
    }


def _variants(found: Findings) -> str:
    evaluation = found.metrics.get("evaluate", {})
    models = variants(evaluation)
    without = variants(_inner(evaluation, "baselines"))
    if not models and not without:
        return '<p class="empty">The stage evaluate has no numbers here yet.</p>'
    everyone = [*models.items(), *without.items()]
    names = [name for name in SCORES if any(_is_number(scores.get(name)) for _, scores in everyone)]
    body = [
        (
            f"{escape(variant)}{'<small>no model</small>' if number >= len(models) else ''}",
            *(_score(scores, name) for name in names),
        )
        for number, (variant, scores) in enumerate(everyone)
    ]
    about = _inner(evaluation, "about")
    prompts = (
        f"{about['examples']} test prompts of the task {about.get('task', '')}. " if "examples" in about else ""
    )
    return (
        f"<p>{escape(str(prompts))}All but perplexity and length ratio are from 0 to 1. Perplexity is of the "
        "reference given the prompt, per token: 1 is the best. Length ratio is words of the answer over words "
        "of the reference. Less is better for perplexity and toxic answers. Below each score its interval; "
        "rows without a model come last.</p>"
        + _table(("Variant", *(SCORES[name] for name in names)), body, numbers=True, group_at=len(models))
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
            f"{dot.y:.3f}<small>{_span(dot.low, dot.high)}</small>",
            speed or "–",
            "yes" if number in front else "",
            escape(source),
        )
        for number, (dot, speed, source) in enumerate(sized)
    ]
    table = _table(("Model", "MB", "ROUGE-L", "Speed", "Front", "Size from"), rows, numbers=True)
    return (
        f"<figure><h3>{escape(title)}</h3>{charts.scatter(title, x_label, 'ROUGE-L', dots)}"
        f"<details><summary>Numbers</summary>{table}</details></figure>"
    )


def _variant_dots(found: Findings, speeds: Mapping[str, float]) -> list[tuple[Dot, str, str]]:
    settings = _inner(_inner(found.params, "evaluate"), "variants")
    dots = []
    for name, scores in variants(found.metrics.get("evaluate", {})).items():
        model = str(_inner(settings, name).get("model") or name)
        size = findings.size(found, model)
        if size is None or not _is_number(scores.get("rougeL")):
            continue
        scheme = found.metrics.get("quantize", {}).get("scheme")
        speed = speeds.get(f"quantize.{scheme}" if model == "quantize" else model)
        dots.append((_dot(name, size.bytes, scores), _times(speed), size.source))
    return dots


def _small_dots(found: Findings, speeds: Mapping[str, float]) -> list[tuple[Dot, str, str]]:
    """The schemes of quantisation, and the student and the pruned model where they were scored on the same
    prompts: their teacher or dense model has the score that the dense model has there."""
    quantize = found.metrics.get("quantize", {})
    schemes = _inner(quantize, "schemes")
    dots = [
        (_dot(name, scores["bytes"], scores), _times(speeds.get(f"quantize.{name}")), "metrics/quantize.json")
        for name, scores in schemes.items()
        if isinstance(scores, Mapping) and _is_number(scores.get("bytes")) and _is_number(scores.get("rougeL"))
    ]
    dense = _inner(schemes, "dense").get("rougeL")
    for stage, before in (("distill", "rougeL_teacher"), ("prune", "rougeL_dense")):
        metrics = found.metrics.get(stage, {})
        size = findings.size(found, stage)
        known = _is_number(metrics.get(before)) and _is_number(metrics.get("rougeL"))
        same = metrics.get("held_out") == quantize.get("prompts")
        if size and known and same and _is_number(dense) and abs(metrics[before] - dense) < SAME_SCORE:
            dots.append((_dot(stage, size.bytes, metrics), _times(speeds.get(stage)), size.source))
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
    alignment = _inner(found.metrics.get("evaluate", {}), "alignment")
    names = {"all": f"all {alignment.get('n')} prompts", "rude": f"{alignment.get('n_rude')} rude prompts"}
    spans, words = [], []
    for part, prompts in names.items():
        inner = _inner(alignment, part)
        for number, when in enumerate(("before", "after")):
            scores = _inner(inner, when)
            value, low, high = (scores.get(f"toxicity_rate{end}") for end in ("", "_low", "_high"))
            if _is_number(value) and _is_number(low) and _is_number(high):
                spans.append(Span(f"{alignment.get(when, when)}, {prompts}", value, low, high, number))
        if _is_number(inner.get("toxicity_fall")):
            kl = f", at a KL of {inner['kl']:.3f} nats an answer" if _is_number(inner.get("kl")) else ""
            fall = f"{_percent(inner['toxicity_fall'])}{_percents(inner, 'toxicity_fall')}"
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
    text = _part_of(findings.text(found.root / "reports" / "ppo" / "summary.md"), "The guard") if events else ""
    return f"<p>{escape(told + ended)}</p>{markdown(text, found.root / 'reports' / 'ppo', found.root)}"


def _samples(found: Findings) -> str:
    samples = findings.lines(found.root / "reports" / "evaluate" / "samples.jsonl")
    if not samples:
        return '<p class="empty">No samples here yet.</p>'
    parts = []
    for number, sample in enumerate(samples):
        prompt, reference = str(sample.get("prompt", "")), str(sample.get("reference", ""))
        answers = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(answer)) or '<i>nothing</i>'}"
            + (' <span class="same">= reference</span>' if str(answer).strip() == reference.strip() else "")
            + "</dd>"
            for name, answer in sample.items()
            if name not in ("prompt", "reference")
        )
        parts.append(
            f"<details{' open' if number < SAMPLES_OPEN else ''}><summary>{number + 1}. "
            f'{escape(_cut(reference))}</summary><div class="sample"><pre>{escape(prompt)}</pre><dl>'
            f"<dt>reference</dt><dd>{escape(reference)}</dd>{answers}</dl></div></details>"
        )
    return f"<p>The same test prompt, answered by every variant; {len(samples)} prompts.</p>{''.join(parts)}"


def _data_card(found: Findings) -> str:
    folder = found.root / "reports"
    text = findings.text(folder / "data.md")
    return markdown(text, folder, found.root) if text else '<p class="empty">No data card here yet.</p>'


def _lineage(found: Findings) -> str:
    rows = []
    for name, each in found.stages.items():
        outputs = "<br>".join(
            f"<code>{escape(output.digest)}</code> {escape(output.path)}"
            + (f" ({_bytes(output.size)})" if output.size is not None else "")
            for output in each.outputs
        )
        ids = "".join(
            f"<br>{label} <code>{escape(value)}</code>"
            for label, value in (("MLflow", each.mlflow_run), ("Prefect", each.flow_run))
            if value
        )
        when = f"{escape(_time(each.ended))}" if each.ended else "–"
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
        + _table(("Stage", "Reads from", "Last run ended, ids", "Outputs (hash, path, size)"), rows)
        + (
            f"<details><summary>{escape(str(PARAMS_FILE))}</summary><pre>{escape(redact(params))}</pre></details>"
            if params
            else ""
        )
    )


# --- pieces


def markdown(text: str, folder: Path, root: Path) -> str:
    """CommonMark with tables as HTML; HTML in it is shown as text. Pictures, named from `folder`, are taken
    into the page when they lie under `root`, and are left out, but for their words, when they do not.
    """
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token
    from markdown_it.utils import EnvType, OptionsDict

    def image(
        self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
    ) -> str:
        token = tokens[index]
        alt = escape(token.content)
        address = data_address((folder / str(token.attrs.get("src", ""))), root)
        return f'<img alt="{alt}" src="{address}">' if address else f"<i>{alt} (picture not here)</i>"

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", image)
    tokens = parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1:]) + 1, 6)}" if token.tag != "h1" else "h3"
    rendered = str(parser.renderer.render(tokens, parser.options, {}))
    return rendered.replace("<table>", '<div class="box"><table>').replace("</table>", "</table></div>")


def data_address(path: Path, root: Path) -> str:
    """A picture as a data URI; empty when it is none, is not there or lies outside of `root`."""
    kind = PICTURES.get(path.suffix.lower())
    try:
        if kind is None or not path.resolve().is_relative_to(root.resolve()):
            return ""
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
    except (OSError, ValueError):
        return ""


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False, group_at: int | None = None
) -> str:
    """A table in a box of its own that scrolls; cells are HTML. A thicker line stands before row `group_at`."""
    top = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    body = "".join(
        f'<tr{" class=first-of-group" if number and number == group_at else ""}><th scope="row">{row[0]}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for number, row in enumerate(rows)
    )
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="box"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _score(scores: Mapping[str, Any], name: str) -> str:
    if not _is_number(scores.get(name)):
        return "–"
    interval = _interval(scores, name)
    return f"{scores[name]:.3f}" + (f"<small>{interval}</small>" if interval else "")


def _interval(scores: Mapping[str, Any], name: str) -> str:
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    return _span(low, high)


def _span(low: Any, high: Any) -> str:
    return f"[{low:.3f}, {high:.3f}]" if _is_number(low) and _is_number(high) else ""


def _percents(scores: Mapping[str, Any], name: str) -> str:
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    return f" [{_percent(low)}, {_percent(high)}]" if _is_number(low) and _is_number(high) else ""


def _dot(label: str, size: int, scores: Mapping[str, Any]) -> Dot:
    low, high = scores.get("rougeL_low"), scores.get("rougeL_high")
    return Dot(
        label,
        size / 1e6,
        scores["rougeL"],
        low if _is_number(low) else None,
        high if _is_number(high) else None,
    )


def _inner(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping inside of another; empty when it is not there or is something else."""
    value = mapping.get(name)
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f}×" if ratio is not None else ""


def _bytes(count: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _time(text: str) -> str:
    """An ISO time in short."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".rstrip()


def _some(reasons: Sequence[str], most: int = 4) -> str:
    more = f" and {len(reasons) - most} more" if len(reasons) > most else ""
    return "; ".join(reasons[:most]) + more


def _cut(text: str, most: int = 110) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _code(text: str) -> str:
    """Escaped text in which `words` between back-quotes are code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def _part_of(text: str, heading: str) -> str:
    """What stands under a heading `## HEADING` in markdown."""
    _, found, rest = text.partition(f"## {heading}\n")
    return rest.split("\n## ", 1)[0] if found else ""
