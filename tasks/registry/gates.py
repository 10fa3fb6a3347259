"""The gates before the alias `champion`: pure functions from scores to verdicts.

A number counts with its 95 % interval, and its worse end must pass: a gate lets through what is shown to be
good enough, not what is not shown to be bad.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tasks.metrics.bootstrap import Interval
from tasks.registry.promote import Cost, Forgetting, Latency, Params
from tasks.stage import UserError


@dataclass(frozen=True)
class Verdict:
    """One gate: what was found, and the bound that its worse end must keep."""

    gate: str
    found: Interval
    side: Literal["at least", "at most"]
    bound: float

    @property
    def short(self) -> float:
        """By how much the worse end misses the bound; 0 or less: passed."""
        return self.bound - self.found.low if self.side == "at least" else self.found.high - self.bound

    @property
    def passed(self) -> bool:
        return self.short <= 0

    def as_json(self) -> dict[str, Any]:
        return {
            "gate": self.gate,
            "value": self.found.value,
            "low": self.found.low,
            "high": self.found.high,
            "side": self.side,
            "bound": self.bound,
            "short": max(0.0, self.short),
            "passed": self.passed,
        }

    def __str__(self) -> str:
        """One line, with by how much the bound is missed if it is."""
        value, low, high = (f"{number:.4g}" for number in self.found)
        shown = value if low == high else f"{value} ({low} to {high})"
        line = f"{self.gate}: {shown}, {self.side} {self.bound:.4g} wanted"
        return line if self.passed else f"{line}: misses by {self.short:.4g}"


@dataclass(frozen=True)
class Candidate:
    """What the gates know of a version: its variant, the evaluation it is in, the bytes of its model."""

    version: str
    variant: str
    evaluation: Mapping[str, Any]
    size: int


def verdicts(params: Params, ours: Candidate, champion: Candidate | None) -> list[Verdict]:
    """Judge scores, forgetting and size, against the bounds and, if there is one, against the champion.

    Raises UserError when a score, or the variant to compare with, is missing in an evaluation.
    """
    return [
        *_scores(params, ours, champion),
        *_forgetting(params.forgetting, ours, champion),
        *_size(params.megabytes, ours, champion),
    ]


def latency_verdicts(params: Latency, mean: Interval, ratio: Interval | None) -> list[Verdict]:
    """Judge the mean seconds an answer, and their ratio to the champion's."""
    found = [Verdict("seconds an answer", mean, "at most", params.bound)]
    if ratio is not None:
        found.append(Verdict("seconds an answer over the champion's", ratio, "at most", params.ratio))
    return found


def difference(first: Interval, second: Interval) -> Interval:
    """first − second of two independent estimates, its interval made of theirs.

    The distances to the ends are added as squares: Newcombe (1998, Stat. Med. 17, 873–890) for proportions,
    Zou & Donner (2008, Stat. Med. 27, 1693–1702) for any estimates with intervals.
    """
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - below, value + above)


def _scores(params: Params, ours: Candidate, champion: Candidate | None) -> Iterator[Verdict]:
    for gate in params.scores:
        found = _score(ours, ours.variant, gate.score)
        higher = gate.better == "higher"
        yield Verdict(gate.score, found, "at least" if higher else "at most", gate.bound)
        if champion is not None:
            change = difference(found, _score(champion, champion.variant, gate.score))
            name = f"{gate.score} less the champion's"
            if higher:
                yield Verdict(name, change, "at least", -gate.margin)
            else:
                yield Verdict(name, change, "at most", gate.margin)


def _forgetting(params: Forgetting, ours: Candidate, champion: Candidate | None) -> Iterator[Verdict]:
    main = ours.evaluation["about"]["task"]
    before = _tasks(ours, params.against)
    theirs = _tasks(champion, champion.variant) if champion is not None else {}
    for task, scores in _tasks(ours, ours.variant).items():
        if task == main:
            continue
        found = _interval(scores, params.score, f"{ours.variant} on {task}")
        name = f"{params.score} on {task} less "
        old = _interval(before[task], params.score, f"{params.against} on {task}")
        yield Verdict(f"{name}{params.against}'s", difference(found, old), "at least", -params.margin)
        if task in theirs:
            best = _interval(theirs[task], params.score, f"the champion on {task}")
            change = difference(found, best)
            yield Verdict(f"{name}the champion's", change, "at least", -params.champion_margin)


def _size(params: Cost, ours: Candidate, champion: Candidate | None) -> Iterator[Verdict]:
    yield Verdict("megabytes", _exactly(ours.size / 1e6), "at most", params.bound)
    if champion is not None:
        ratio = _exactly(ours.size / champion.size)
        yield Verdict("megabytes over the champion's", ratio, "at most", params.ratio)


def _score(candidate: Candidate, variant: str, score: str) -> Interval:
    return _interval(candidate.evaluation[variant], score, f"{variant} in version {candidate.version}")


def _tasks(candidate: Candidate, variant: str) -> Mapping[str, Any]:
    tasks = candidate.evaluation["tasks"]
    if variant not in tasks:
        raise UserError(
            f"version {candidate.version} was evaluated without the tasks of {variant}; it has those of "
            f"{', '.join(tasks)}: name one of them in promote.forgetting.against"
        )
    found: Mapping[str, Any] = tasks[variant]
    return found


def _interval(scores: Mapping[str, float], score: str, whose: str) -> Interval:
    if score not in scores:
        known = ", ".join(name for name in scores if not name.endswith(("_low", "_high")))
        raise UserError(f"promote: there is no {score} of {whose}; there are {known}")
    value = scores[score]
    return Interval(value, scores.get(f"{score}_low", value), scores.get(f"{score}_high", value))


def _exactly(value: float) -> Interval:
    return Interval(value, value, value)
