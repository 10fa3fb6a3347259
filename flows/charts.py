"""Numbers → inline SVG, as text: lines, points with a front, intervals. Pure functions.

Colours and fonts come from the page's style sheet, so that a picture follows light and dark. A series is told
apart by its dashes and marks too, never by colour alone. Widths are small on purpose: a picture fills its
column, and on a telephone its letters must stay readable.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 42
LEGEND_ROW = 16
LETTER = 6.2  # px, the mean width of a letter of 11 px
STYLES = 4  # of lines, in the style sheet
TICKS = 5
LOG_FROM = 20.0  # a curve that falls by more than this is shown on a logarithmic axis
SUFFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
LABEL_STEP = 13

Scale = Callable[[float], float]
Box = tuple[float, float, float, float]


class Line(NamedTuple):
    """A curve: `points` are (x, y); `marked` puts a dot on each."""

    label: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


class Dot(NamedTuple):
    """A model: `x` its size, `y` its quality with the interval from `low` to `high`."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Span(NamedTuple):
    """A number with its interval; `style` (0, 1, …) says to which series it belongs."""

    label: str
    value: float
    low: float
    high: float
    style: int = 0


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of (cost, quality) that no other beats: none has both no more cost and no less quality, and
    one of the two better. Equal points stand together. In order of rising cost."""
    front = [
        index
        for index, (cost, quality) in enumerate(points)
        if not any(
            other_cost <= cost and other >= quality and (other_cost, other) != (cost, quality)
            for other_cost, other in points
        )
    ]
    return sorted(front, key=lambda index: points[index])


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """About `count` round numbers from `low` to `high`, ends included where they are round."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … from `low` to `high` (both above 0); powers of ten alone over more than three decades."""
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in found if low * 0.999 <= tick <= high * 1.001] or [low]


def short(value: float) -> str:
    """A number for an axis: 1500000 → 1.5M."""
    for size, suffix in SUFFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """Curves over one pair of axes. Points that are not finite are left out, and curves without points.

    The y axis is logarithmic, and says so, when all is above 0 and the largest is 20 times the smallest.
    """
    kept = [line._replace(points=[point for point in line.points if _finite(*point)]) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return _empty(title)
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points]
    log = min(ys) > 0 and max(ys) / min(ys) > LOG_FROM
    legend, legend_height = _legend(kept)
    top = TOP + legend_height
    height = HEIGHT + legend_height
    x_low, x_high = _widened(min(xs), max(xs), 0.0)
    to_x = _linear(x_low, x_high, LEFT, WIDTH - RIGHT)
    if log:
        low, high = min(ys) / 1.15, max(ys) * 1.15
        to_y = _logarithmic(low, high, height - BOTTOM, top)
        marks = log_ticks(low, high)
    else:
        low, high = _widened(min(ys), max(ys), 0.06)
        to_y = _linear(low, high, height - BOTTOM, top)
        marks = ticks(low, high)
    body = [
        legend,
        _axes(
            height,
            top,
            [(to_x(x), short(x)) for x in ticks(x_low, x_high)],
            [(to_y(y), short(y)) for y in marks],
        ),
        _axis_labels(height, top, x_label, f"{y_label}, log scale" if log else y_label),
    ]
    for number, line in enumerate(kept):
        style = f"s{number % STYLES}"
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in line.points)
        if len(line.points) > 1:
            body.append(f'<polyline class="curve {style}" points="{path}"/>')
        if line.marked or len(line.points) == 1:
            body += [
                f'<circle class="mark {style}" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3"/>'
                for x, y in line.points
            ]
    return _svg(height, title, body)


def scatter(title: str, x_label: str, y_label: str, dots: Sequence[Dot]) -> str:
    """Quality over size, with intervals. The Pareto front is filled and joined; what it beats is hollow.

    The x axis starts at 0.
    """
    dots = [dot for dot in dots if _finite(dot.x, dot.y)]
    if not dots:
        return _empty(title)
    height = HEIGHT + 70
    ends = [end for dot in dots for end in (dot.y, dot.low, dot.high) if end is not None and math.isfinite(end)]
    y_low, y_high = _widened(min(ends), max(ends), 0.08)
    x_high = max(dot.x for dot in dots) * 1.12 or 1.0
    to_x = _linear(0.0, x_high, LEFT, WIDTH - RIGHT)
    to_y = _linear(y_low, y_high, height - BOTTOM, TOP)
    front = pareto([(dot.x, dot.y) for dot in dots])
    body = [
        _axes(
            height,
            TOP,
            [(to_x(x), short(x)) for x in ticks(0.0, x_high)],
            [(to_y(y), short(y)) for y in ticks(y_low, y_high, 8)],
        ),
        _axis_labels(height, TOP, x_label, y_label),
    ]
    if len(front) > 1:
        path = " ".join(f"{to_x(dots[index].x):.1f},{to_y(dots[index].y):.1f}" for index in front)
        body.append(f'<polyline class="front" points="{path}"/>')
    for index, dot in sorted(enumerate(dots), key=lambda entry: entry[0] in front):  # the front on top
        x, y = to_x(dot.x), to_y(dot.y)
        if dot.low is not None and dot.high is not None and _finite(dot.low, dot.high):
            body.append(
                f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{to_y(dot.low):.1f}" y2="{to_y(dot.high):.1f}"/>'
            )
        kind = "on" if index in front else "off"
        body.append(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    body += _labels([(to_x(dot.x), to_y(dot.y), dot.label) for dot in dots], height)
    return _svg(height, title, body)


def intervals(title: str, x_label: str, spans: Sequence[Span], high: float | None = None) -> str:
    """One row a span: its label, a dot and the interval as a bar, and the numbers. The axis starts at 0 and
    ends at `high`, or where the numbers end."""
    spans = [span for span in spans if _finite(span.value, span.low, span.high)]
    if not spans:
        return _empty(title)
    row, left = 44, 12
    height = row * len(spans) + BOTTOM + 6
    low = min(0.0, *(span.low for span in spans))
    end = high if high is not None else max(*(span.high for span in spans), 0.0) * 1.08 or 1.0
    to_x = _linear(low, end, left, WIDTH - RIGHT)
    bottom = height - BOTTOM
    body = [
        f'<line class="grid" x1="{to_x(x):.1f}" x2="{to_x(x):.1f}" y1="4" y2="{bottom}"/>'
        f'<text class="tick" text-anchor="middle" x="{to_x(x):.1f}" y="{bottom + 15}">{short(x)}</text>'
        for x in ticks(low, end)
    ]
    body.append(
        f'<text class="name" text-anchor="middle" x="{WIDTH / 2:.0f}" y="{height - 6}">{escape(x_label)}</text>'
    )
    for number, span in enumerate(spans):
        y, style = number * row + 32, f"s{span.style % STYLES}"
        words = f"{span.label}: {span.value:.3f} [{span.low:.3f}, {span.high:.3f}]"
        body.append(f'<text class="word halo" x="{left}" y="{y - 12}">{escape(words)}</text>')
        body.append(
            f'<line class="bar {style}" x1="{to_x(span.low):.1f}" '
            f'x2="{to_x(span.high):.1f}" y1="{y}" y2="{y}"/>'
        )
        body.append(f'<circle class="mark {style}" cx="{to_x(span.value):.1f}" cy="{y}" r="5"/>')
    return _svg(height, title, body)


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with `share` of it more at both ends; one number becomes a range around it."""
    if high > low:
        return low - share * (high - low), high + share * (high - low)
    around = abs(low) * 0.1 or 1.0
    return low - around, high + around


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    linear = _linear(math.log(low), math.log(high), start, end)
    return lambda value: linear(math.log(value))


def _axes(height: int, top: int, xs: Iterable[tuple[float, str]], ys: Iterable[tuple[float, str]]) -> str:
    """Grid lines and numbers; each tick is (place in px, text)."""
    bottom, right = height - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>'
        for y, text in ys
    ]
    parts += [
        f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{bottom + 16}">{text}</text>'
        for x, text in xs
    ]
    parts.append(f'<polyline class="axis" points="{LEFT},{top} {LEFT},{bottom} {right},{bottom}"/>')
    return "".join(parts)


def _axis_labels(height: int, top: int, x_label: str, y_label: str) -> str:
    middle = (top + height - BOTTOM) / 2
    return (
        f'<text class="name" text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 6}">'
        f"{escape(x_label)}</text>"
        f'<text class="name" text-anchor="middle" transform="translate(12 {middle:.0f}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )


def _legend(lines: Sequence[Line]) -> tuple[str, int]:
    """The names of the lines with a sample of each, and the height that it takes in px."""
    parts, x, y = [], float(LEFT), 12
    for number, line in enumerate(lines):
        width = 34 + LETTER * len(line.label)
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + LEGEND_ROW
        style = f"s{number % STYLES}"
        parts.append(f'<line class="curve {style}" x1="{x:.0f}" x2="{x + 20:.0f}" y1="{y - 4}" y2="{y - 4}"/>')
        if line.marked:
            parts.append(f'<circle class="mark {style}" cx="{x + 10:.0f}" cy="{y - 4}" r="3"/>')
        parts.append(f'<text class="word" x="{x + 25:.0f}" y="{y}">{escape(line.label)}</text>')
        x += width
    return "".join(parts), y - 12 + LEGEND_ROW


def _labels(points: Sequence[tuple[float, float, str]], height: int) -> list[str]:
    """A label beside each point (x, y, text), where it covers neither a point nor another label; one that had
    to go further away gets a line to its point."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    parts = []
    for x, y, text in sorted(points, key=lambda point: -point[0]):
        width = LETTER * len(text)
        box = _free_box(x, y, width, height, taken)
        taken.append(box)
        start, middle = box[0], (box[1] + box[3]) / 2
        if abs(middle - y) > 8:
            near = start - 2 if start > x else start + width + 2
            parts.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{middle:.1f}"/>')
        parts.append(f'<text class="word halo" x="{start:.1f}" y="{middle + 4:.1f}">{escape(text)}</text>')
    return parts


def _free_box(x: float, y: float, width: float, height: int, taken: Sequence[Box]) -> Box:
    steps = [step for distance in range(8) for step in ((distance, -distance) if distance else (0,))]
    choices = [
        (start, y + step * LABEL_STEP - 6, start + width, y + step * LABEL_STEP + 6)
        for step in steps
        for start in (x + 9, x - 9 - width)
    ]
    inside = [
        box
        for box in choices
        if box[0] >= LEFT + 2 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= height - BOTTOM
    ]
    for box in inside:
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            return box
    return (inside or choices)[0]


def _svg(height: int, title: str, body: Iterable[str]) -> str:
    name = escape(title)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{''.join(body)}</svg>"
    )


def _empty(title: str) -> str:
    return f'<p class="empty">{escape(title)}: nothing recorded.</p>'
