"""The graph of the stages → inline SVG, as text, in layers by depth: across a wide page, down a narrow one."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal, NamedTuple

LETTER = 6.3  # px, the mean width of a letter of 11 px
PADDING = 8
ROW = 15
HEAD = 40  # of a box: name and state
GAP = 12
ARROW = 26
WIDE_BOX = 142
NARROW = 372
NARROW_BOX = 230


class Box(NamedTuple):
    """What the picture says of a stage: `state` in words with its `mark` (one letter) and `kind` (for the
    colour), and figures as (name, value)."""

    state: str
    mark: str
    kind: str
    figures: Sequence[tuple[str, str]]


def layers(parents: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The stages by depth: the first have no parents; every other stands one below its deepest parent.

    `parents` has each stage after its parents; a parent that is not in it counts for nothing.
    """
    depth: dict[str, int] = {}
    for name, above in parents.items():
        depth[name] = max((depth[parent] + 1 for parent in above if parent in depth), default=0)
    found: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name, level in depth.items():
        found[level].append(name)
    return found


def direct(parents: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """The edges (parent, child) without those that a longer path says already (transitive reduction)."""
    above: dict[str, set[str]] = {}
    for name, own in parents.items():
        above[name] = {each for parent in own if parent in above for each in (parent, *above[parent])}
    return [
        (parent, name)
        for name, own in parents.items()
        for parent in own
        if parent in above and not any(parent in above[other] for other in own if other in above)
    ]


def picture(
    title: str, parents: Mapping[str, Sequence[str]], boxes: Mapping[str, Box], way: Literal["across", "down"]
) -> str:
    """The graph as SVG; `boxes` has an entry for each stage of `parents`. Empty for an empty graph."""
    levels = layers(parents)
    if not levels:
        return ""
    places = _across(levels, boxes) if way == "across" else _down(levels, boxes)
    width = max(x + w for x, _, w, _ in places.values()) + 2
    height = max(y + h for _, y, _, h in places.values()) + 2
    arrow = f"tip-{way}"
    edges = "".join(
        f'<path class="edge" marker-end="url(#{arrow})" d="{_edge(places[one], places[other], way)}"/>'
        for one, other in direct(parents)
    )
    drawn = "".join(_drawn(name, boxes[name], place) for name, place in places.items())
    name = escape(title)
    return (
        f'<svg class="graph {way}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{name}">'
        f"<title>{name}</title>"
        f'<defs><marker id="{arrow}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
        f"{edges}{drawn}</svg>"
    )


Place = tuple[float, float, float, float]  # left, top, width, height


def _across(levels: Sequence[Sequence[str]], boxes: Mapping[str, Box]) -> dict[str, Place]:
    heights = {name: _height(box, WIDE_BOX) for name, box in boxes.items()}
    columns = [sum(heights[name] for name in level) + GAP * (len(level) - 1) for level in levels]
    places = {}
    for column, level in enumerate(levels):
        y = (max(columns) - columns[column]) / 2 + 1
        for name in level:
            places[name] = (column * (WIDE_BOX + ARROW) + 1.0, y, float(WIDE_BOX), heights[name])
            y += heights[name] + GAP
    return places


def _down(levels: Sequence[Sequence[str]], boxes: Mapping[str, Box]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    y = 1.0
    for level in levels:
        width = min((NARROW - GAP / 2 * (len(level) - 1)) / len(level), NARROW_BOX)
        x = (NARROW - width * len(level) - GAP / 2 * (len(level) - 1)) / 2
        tallest = max(_height(boxes[name], width) for name in level)
        for name in level:
            places[name] = (x, y, width, tallest)
            x += width + GAP / 2
        y += tallest + ARROW
    return places


def _rows(box: Box, width: float) -> list[tuple[str, str]]:
    """The figures in rows of (left, right): name and value in one row, or in more when they do not fit."""
    letters = int((width - 2 * PADDING) / LETTER)
    rows = []
    for name, value in box.figures:
        first, *rest = _broken(name, letters)
        rows.append((first, ""))
        rows += [(each, "") for each in rest]
        last = rows[-1][0]
        if len(last) + len(value) < letters:
            rows[-1] = (last, value)
        else:
            rows.append(("", value))
    return rows


def _broken(name: str, letters: int) -> list[str]:
    """A name in lines of at most so many letters, broken behind `.` and `_`; a longer part is cut."""
    lines = [""]
    for part in re.findall(r"[^._]*[._]|[^._]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > letters:
            lines.append("")
        lines[-1] += part
    return [line if len(line) <= letters else line[: letters - 1] + "…" for line in lines]


def _height(box: Box, width: float) -> float:
    return HEAD + ROW * len(_rows(box, width)) + (6 if box.figures else 0)


def _edge(start: Place, end: Place, way: Literal["across", "down"]) -> str:
    if way == "across":
        x, y = start[0] + start[2], start[1] + start[3] / 2
        to_x, to_y = end[0], end[1] + end[3] / 2
        half = (to_x - x) / 2
        return f"M{x:.1f} {y:.1f} C{x + half:.1f} {y:.1f} {to_x - half:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
    x, y = start[0] + start[2] / 2, start[1] + start[3]
    to_x, to_y = end[0] + end[2] / 2, end[1]
    half = (to_y - y) / 2
    return f"M{x:.1f} {y:.1f} C{x:.1f} {y + half:.1f} {to_x:.1f} {to_y - half:.1f} {to_x:.1f} {to_y:.1f}"


def _drawn(name: str, box: Box, place: Place) -> str:
    x, y, width, height = place
    parts = [
        f'<rect class="stage {box.kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        'rx="6"/>',
        f'<text class="stage-name" x="{x + PADDING:.1f}" y="{y + 17:.1f}">{escape(name)}</text>',
        f'<text class="state {box.kind}" x="{x + PADDING:.1f}" y="{y + 33:.1f}">'
        f"{escape(f'{box.mark} {box.state}')}</text>",
    ]
    line = y + HEAD + 10
    for left, right in _rows(box, width):
        if left:
            parts.append(f'<text class="tick" x="{x + PADDING:.1f}" y="{line:.1f}">{escape(left)}</text>')
        if right:
            parts.append(
                f'<text class="word" text-anchor="end" x="{x + width - PADDING:.1f}" y="{line:.1f}">'
                f"{escape(right)}</text>"
            )
        line += ROW
    return f"<g>{''.join(parts)}</g>"
