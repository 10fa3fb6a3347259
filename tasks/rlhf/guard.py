"""The guard against reward hacking: what the reward cannot see, watched on the same held-out prompts.

A policy that exploits its reward raises the reward while what the reward stands for falls (arXiv 2210.10760).
Every few steps the guard is shown a `Health`; it holds it against the first one and answers with a `Verdict`.
It runs no model and carries out nothing itself.

A fall of the gold score, or a rise of toxicity, must be more than noise: the mean of the paired changes per
prompt, less `z` standard errors, has to exceed what is tolerated. That is the lower end of a one-sided
interval, so C checks of a policy whose true changes are tolerable disturb it with a chance of about
2·C·(1 − Φ(z)) at most: 2.7 % for ten checks at z = 3. The other limits are meant to be wide and hold
for the figures as they are. A figure that is not a number breaks its limit.

Each breached check in a row goes one act further: warn, raise β, roll back to the best step, stop. A clean
check takes one act back. A fall of the gold score beyond `gold_drop_hard` rolls back at once. The guard must
outlive the roll-back that it asked for: put back to its own state of that earlier step, it would let a run go
in circles.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Act = Literal["none", "warn", "raise_beta", "roll_back", "stop"]
ACTS: tuple[Act, ...] = ("none", "warn", "raise_beta", "roll_back", "stop")


@dataclass(frozen=True)
class Limits:
    """What is tolerated against the first check."""

    gold_drop: float  # fall of the mean gold score, in its own units
    gold_drop_hard: float  # fall of the mean gold score that rolls back at once
    toxicity_rise: float  # rise of the mean toxicity
    z: float  # standard errors of doubt in favour of the policy, for gold and toxicity
    kl: float  # mean divergence of a response from the reference, in nats
    length_ratio_low: float  # mean response length over that of the first check
    length_ratio_high: float
    distinct_2: float  # share of distinct word bigrams over that of the first check


class Health(NamedTuple):
    """How a policy answers N >= 2 held-out prompts, the same ones in the same order at every check.

    Answers drawn greedily, or with the same random numbers each time, leave the least noise in the changes.
    """

    step: int
    proxy: float  # mean of the reward that the policy is trained on
    gold: tuple[float, ...]  # [N], higher is better
    toxicity: tuple[float, ...]  # [N]
    kl: float  # mean per response, in nats
    length: float  # mean per response
    distinct_2: float


class Verdict(NamedTuple):
    """What to do after a check, and which limits were broken, each as `name: what was seen`."""

    step: int
    act: Act
    reasons: tuple[str, ...]


class State(NamedTuple):
    """All that later verdicts depend on besides the limits."""

    start: Health  # the first check
    best_step: int  # the clean check with the highest mean gold score, the latest of equals
    best_gold: float
    level: int  # how far the guard has gone: an index of ACTS


class Guard:
    """Judges one run: the same checks in the same order get the same verdicts, resumed or not."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.state: State | None = None

    @property
    def best_step(self) -> int:
        """The step to roll back to. There is one from the first check on."""
        assert self.state is not None
        return self.state.best_step

    def observe(self, health: Health) -> Verdict:
        """Return what to do after this check. The first one is clean: the others are held against it."""
        if self.state is None:
            self.state = State(health, health.step, mean(health.gold), level=0)
            return Verdict(health.step, "none", ())
        self.state, verdict = judge(self.limits, self.state, health)
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values, which JSON holds without loss; nothing before the first check."""
        return {} if self.state is None else {**self.state._asdict(), "start": self.state.start._asdict()}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        if not values:
            self.state = None
            return
        start = values["start"]
        health = Health(**{**start, "gold": tuple(start["gold"]), "toxicity": tuple(start["toxicity"])})
        self.state = State(**{**values, "start": health})


def judge(limits: Limits, state: State, health: Health) -> tuple[State, Verdict]:
    """Return the state after a check, and the verdict on it."""
    reasons = breaches(limits, state.start, health)
    gold = mean(health.gold)
    if not reasons:
        state = state._replace(level=max(state.level - 1, 0))
        if gold >= state.best_gold:
            state = state._replace(best_step=health.step, best_gold=gold)
        return state, Verdict(health.step, "none", ())
    severe = "gold_drop" in reasons and exceeds(mean(state.start.gold) - gold, limits.gold_drop_hard)
    lowest = ACTS.index("roll_back" if severe else "warn")
    level = min(max(state.level + 1, lowest), ACTS.index("stop"))
    sentences = tuple(f"{limit}: {seen}" for limit, seen in reasons.items())
    return state._replace(level=level), Verdict(health.step, ACTS[level], sentences)


def breaches(limits: Limits, start: Health, health: Health) -> dict[str, str]:
    """Return the limits that a check breaks, each with what was seen."""
    reasons = {}
    fall = [before - now for before, now in zip(start.gold, health.gold, strict=True)]
    rise = [now - before for before, now in zip(start.toxicity, health.toxicity, strict=True)]
    for limit, changes, tolerated in (
        ("gold_drop", fall, limits.gold_drop),
        ("toxicity_rise", rise, limits.toxicity_rise),
    ):
        at_least = lower_bound(changes, limits.z)
        if exceeds(at_least, tolerated):
            reasons[limit] = (
                f"{mean(changes):.3f}, at least {at_least:.3f}, tolerated {tolerated:g}"
                f" (the reward went from {start.proxy:.3f} to {health.proxy:.3f})"
            )
    if exceeds(health.kl, limits.kl):
        reasons["kl"] = f"{health.kl:.3f} nats a response, tolerated {limits.kl:g}"
    shortest, longest = limits.length_ratio_low * start.length, limits.length_ratio_high * start.length
    if exceeds(shortest, health.length):
        reasons["length_ratio_low"] = (
            f"a mean response length of {health.length:.1f}, tolerated down to {shortest:.1f}"
        )
    if exceeds(health.length, longest):
        reasons["length_ratio_high"] = (
            f"a mean response length of {health.length:.1f}, tolerated up to {longest:.1f}"
        )
    least = limits.distinct_2 * start.distinct_2
    if exceeds(least, health.distinct_2):
        reasons["distinct_2"] = (
            f"{health.distinct_2:.3f} of the word bigrams distinct, tolerated down to {least:.3f}"
        )
    return reasons


def lower_bound(changes: Sequence[float], z: float) -> float:
    """Return the mean of N >= 2 paired changes less z standard errors: a one-sided bound of confidence Φ(z)."""
    centre = mean(changes)
    variance = math.fsum((change - centre) ** 2 for change in changes) / (len(changes) - 1)
    return centre - z * math.sqrt(variance / len(changes))


def mean(numbers: Sequence[float]) -> float:
    """Return the mean."""
    return math.fsum(numbers) / len(numbers)


def exceeds(value: float, limit: float) -> bool:
    """Say whether a value is beyond a limit; one that is not a number is."""
    return not value <= limit
