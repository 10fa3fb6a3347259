"""The comparison as one page, reports/compare.html: params that differ, metrics, intervals as pictures.

It asks for nothing from the network and runs no script. All that comes from data is escaped.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from flows import charts
from flows.charts import Span
from flows.compare import Comparison, Number, letter, mark
from flows.page import POLICY
from flows.page_style import STYLE
from tasks.stage.files import write_text

PAGE = Path("reports") / "compare.html"
VERDICTS = {"≠": "apart from A", "≈": "not told apart from A", "=": "the number of A", " ": ""}


def write(root: Path, found: Comparison, view: str | None) -> Path:
    """Write the page; gives its path. `view` is the address of MLflow's own page of the comparison."""
    path = root / PAGE
    write_text(path, html(found, view))
    return path


def html(found: Comparison, view: str | None) -> str:
    """The whole page."""
    sides = "".join(
        f"<li><b>{letter(number)}</b> {escape(side.label)}</li>" for number, side in enumerate(found.sides)
    )
    link = (
        f'<p><a href="{escape(view)}">The same in MLflow</a> while <code>lifecycle ui</code> runs</p>'
        if view
        else ""
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Comparison</title><style>{STYLE}</style></head><body>"
        f"<header><h1>Comparison</h1><ul>{sides}</ul><p>{link}</p></header><main>"
        f"<section><h2>Params that differ</h2>{_params(found)}</section>"
        f"<section><h2>Metrics</h2>{_metrics(found)}</section>"
        f"<section><h2>Intervals</h2>{_pictures(found)}</section></main>"
        "<footer><p>Written by <code>lifecycle compare</code>. Intervals in square brackets are 95 %. ≠: they "
        "do not overlap with those of A: the difference is real; ≈: they do, it may be none.</p></footer>"
        "</body></html>\n"
    )


def _params(found: Comparison) -> str:
    if not found.params:
        return '<p class="empty">None.</p>'
    rows = "".join(
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{_param(value)}</td>' for value in values)}</tr>"
        for key, values in found.params.items()
    )
    return _table("param", found, rows)


def _metrics(found: Comparison) -> str:
    if not found.metrics:
        return f'<p class="empty">None differs, of {found.equal}.</p>'
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(map(_cell, numbers))}</tr>"
        for name, numbers in found.metrics.items()
    )
    return _table("metric", found, rows) + f'<p class="quiet">Equal and not shown: {found.equal}.</p>'


def _param(value: str | None) -> str:
    return "–" if value is None else escape(value)


def _cell(number: Number | None) -> str:
    if number is None:
        return "<td>–</td>"
    sign = mark(number)
    return f'<td title="{VERDICTS[sign]}">{escape(str(number))} {sign}</td>'


def _table(head: str, found: Comparison, rows: str) -> str:
    columns = "".join(f"<th>{letter(number)}</th>" for number in range(len(found.sides)))
    return (
        f'<div class="box"><table class="numbers"><thead><tr><th>{head}</th>{columns}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _pictures(found: Comparison) -> str:
    drawn = [
        _picture(name, numbers) for name, numbers in found.metrics.items() if any(map(_has_interval, numbers))
    ]
    if not drawn:
        return '<p class="empty">No metric that differs has an interval.</p>'
    return f'<div class="charts">{"".join(drawn)}</div>'


def _picture(name: str, numbers: Sequence[Number | None]) -> str:
    spans = [
        Span(letter(place), number.value, number.low, number.high, style=1 if number.apart else 0)
        for place, number in enumerate(numbers)
        if number is not None and number.low is not None and number.high is not None
    ]
    picture = charts.intervals(name, name, spans)
    return f"<figure><h3>{escape(name)}</h3>{picture}</figure>"


def _has_interval(number: Number | None) -> bool:
    return number is not None and number.low is not None
