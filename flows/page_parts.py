"""Pieces of a page: numbers, sizes and times as text, tables, and markdown as HTML. All of it is escaped."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from flows.charts import Dot

PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}


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


def table(
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


def score(scores: Mapping[str, Any], name: str) -> str:
    """A score with three digits, its interval below it."""
    if not is_number(scores.get(name)):
        return "–"
    between = interval(scores, name)
    return f"{scores[name]:.3f}" + (f"<small>{between}</small>" if between else "")


def interval(scores: Mapping[str, Any], name: str) -> str:
    """The interval of a score; empty where it has none."""
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    return span(low, high)


def span(low: Any, high: Any) -> str:
    """Two ends as an interval; empty where one is missing."""
    return f"[{low:.3f}, {high:.3f}]" if is_number(low) and is_number(high) else ""


def percents(scores: Mapping[str, Any], name: str) -> str:
    """The interval of a share, in per cent; empty where it has none."""
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    return f" [{percent(low)}, {percent(high)}]" if is_number(low) and is_number(high) else ""


def dot(label: str, size: int, scores: Mapping[str, Any]) -> Dot:
    """A model's size in MB and its ROUGE-L as a point."""
    low, high = scores.get("rougeL_low"), scores.get("rougeL_high")
    return Dot(
        label,
        size / 1e6,
        scores["rougeL"],
        low if is_number(low) else None,
        high if is_number(high) else None,
    )


def inner(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping inside of another; empty when it is not there or is something else."""
    value = mapping.get(name)
    return value if isinstance(value, Mapping) else {}


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %"


def times(ratio: float | None) -> str:
    """A ratio as so many times; empty of None."""
    return f"{ratio:.2f}×" if ratio is not None else ""


def storage(count: int) -> str:
    """A number of bytes in short."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Seconds in short."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def moment(text: str) -> str:
    """An ISO time in short."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{found:%Y-%m-%d %H:%M} {found.tzname() or ''}".rstrip()


def some(reasons: Sequence[str], most: int = 4) -> str:
    """The first few reasons, and how many more there are."""
    more = f" and {len(reasons) - most} more" if len(reasons) > most else ""
    return "; ".join(reasons[:most]) + more


def cut(text: str, most: int = 110) -> str:
    """A text, shortened to `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def code(text: str) -> str:
    """Escaped text in which `words` between back-quotes are code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def part_of(text: str, heading: str) -> str:
    """What stands under a heading `## HEADING` in markdown."""
    _, found, rest = text.partition(f"## {heading}\n")
    return rest.split("\n## ", 1)[0] if found else ""
