"""Two or more variants side by side: the params that differ, and which differences of metrics are real.

A metric with NAME_low and NAME_high has a 95 % interval. Two such numbers are called apart when their intervals
do not overlap. That is cautious: two equally wide intervals that just touch are about p = 0.006, and numbers
whose intervals overlap may still differ. A paired bootstrap over the prompts, as `evaluate` has for the
variants of one run, would see more, but needs the score of each prompt of both, and metrics keep means alone.
A metric without an interval gets no verdict.
"""

import fnmatch
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.pipeline import Stage
from flows.sources import Side

ENDS = ("_low", "_high")


@dataclass(frozen=True)
class Number:
    """A metric of one side, with its 95 % interval where it has one. `apart` from that of the first side: None
    where nobody can say; `same` when it is that number."""

    value: float
    low: float | None = None
    high: float | None = None
    apart: bool | None = None
    same: bool = False

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "apart": self.apart}

    def __str__(self) -> str:
        value = f"{self.value:.4g}"
        if self.low is None or self.high is None:
            return value
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """`params` and `metrics` have one entry a side, None where a side has none. `equal` counts the metrics
    among those asked for that are the same in all."""

    sides: Sequence[Side]
    params: Mapping[str, Sequence[str | None]]
    metrics: Mapping[str, Sequence[Number | None]]
    equal: int


def compare(sides: Sequence[Side], names: Sequence[str]) -> Comparison:
    """Compare all with the first; `names` are the metrics to show, of which equal ones are only counted."""
    keys = dict.fromkeys(key for side in sides for key in side.params)
    params = {key: [side.params.get(key) for side in sides] for key in keys}
    metrics = {name: _numbers(sides, name) for name in names}
    differ = {
        name: found for name, found in metrics.items() if len({number and number.value for number in found}) > 1
    }
    return Comparison(
        sides,
        {key: values for key, values in params.items() if len(set(values)) > 1},
        differ,
        len(metrics) - len(differ),
    )


def shown(sides: Sequence[Side], graph: Mapping[str, Stage], patterns: Sequence[str]) -> list[str]:
    """The metrics to show: those that fit a pattern (`evaluate.*.rougeL`); without patterns those that `meta:
    show` names, or the plain numbers of a stage that names none. At least two sides have them."""
    counted: dict[str, int] = {}
    for side in sides:
        for name in side.metrics:
            counted[name] = counted.get(name, 0) + 1
    common = [name for name, count in counted.items() if count > 1 and not name.endswith(ENDS)]
    if patterns:
        return [name for name in common if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    usual = [
        name
        for stage, known in graph.items()
        for name in ([f"{stage}.{key}" for key in known.meta.show] or _plain(common, stage))
    ]
    return [name for name in usual if name in counted and counted[name] > 1]


def apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two intervals (low, high) have no point in common."""
    return one[1] < other[0] or other[1] < one[0]


def show(found: Comparison) -> None:
    """Print the params that differ, then the metrics, with a mark where a difference from the first is real."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    labels = [f"{letter(number)}" for number in range(len(found.sides))]
    for label, side in zip(labels, found.sides, strict=True):
        console.print(f"{label}  {side.label}", markup=False, highlight=False, soft_wrap=True)
    sys.stdout.write("\n")
    if found.params:
        table = Table(box=None, header_style="bold")
        table.add_column("param", no_wrap=True)
        for label in labels:
            table.add_column(label, overflow="fold")
        for key, values in found.params.items():
            table.add_row(key, *("–" if value is None else value for value in values))
        console.print(table)
    else:
        console.print("no param differs")
    sys.stdout.write("\n")
    if not found.metrics:
        console.print(f"no metric differs, of {found.equal} that both have")
        return
    table = Table(box=None, header_style="bold")
    table.add_column("metric", no_wrap=True)
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for name, numbers in found.metrics.items():
        table.add_row(name, *(f"{_text(number)} {mark(number)}" for number in numbers))
    console.print(table)
    console.print(
        f"≠ apart from {labels[0]}: the 95 % intervals do not overlap   ≈ they do   "
        f"equal and not shown: {found.equal}",
        style="dim",
        highlight=False,
    )


def as_json(found: Comparison) -> dict[str, Any]:
    """The comparison for scripts."""
    return {
        "sides": [{"label": side.label, "kind": side.kind, "run_id": side.run_id} for side in found.sides],
        "params": {key: list(values) for key, values in found.params.items()},
        "metrics": {
            name: [number and number.as_json() for number in numbers] for name, numbers in found.metrics.items()
        },
        "equal_metrics": found.equal,
    }


def letter(number: int) -> str:
    """A, B, … Z, 27, 28, …: a short name for a side."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def mark(number: Number | None) -> str:
    """≠ for a real difference from the first side, ≈ for one that may be none, = for the same number."""
    if number is None or number.apart is None:
        return " "
    if number.same:
        return "="
    return "≠" if number.apart else "≈"


def _numbers(sides: Sequence[Side], name: str) -> list[Number | None]:
    found: list[Number | None] = []
    first = _interval(sides[0], name)
    for side in sides:
        if name not in side.metrics:
            found.append(None)
            continue
        own = _interval(side, name)
        verdict = apart(first, own) if side is not sides[0] and first and own else None
        same = side.metrics[name] == sides[0].metrics.get(name)
        found.append(Number(side.metrics[name], own and own[0], own and own[1], verdict, same))
    return found


def _interval(side: Side, name: str) -> tuple[float, float] | None:
    low, high = (side.metrics.get(f"{name}{end}") for end in ENDS)
    return None if low is None or high is None else (low, high)


def _plain(names: Sequence[str], stage: str) -> list[str]:
    return [name for name in names if name.startswith(f"{stage}.") and name.count(".") == 1]


def _text(number: Number | None) -> str:
    return "–" if number is None else str(number)
