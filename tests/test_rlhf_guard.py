"""The guard: what it counts as a breach, how it escalates, how often it is wrong and how soon it is right."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.rlhf.guard import ACTS, Guard, Health, Limits, Verdict, breaches, lower_bound

LIMITS = Limits(
    gold_drop=0.02,
    gold_drop_hard=0.15,
    toxicity_rise=0.02,
    z=3.0,
    kl=5.0,
    length_ratio_low=0.5,
    length_ratio_high=1.5,
    distinct_2=0.7,
)
CHECKS = 10
PROMPTS = 64
START = Health(0, 0.1, (0.8,) * PROMPTS, (0.1,) * PROMPTS, kl=0.0, length=12.0, distinct_2=0.6)


def at(step: int, **changes: Any) -> Health:
    return START._replace(step=step, **changes)


def fallen(step: int, by: float) -> Health:
    """Every prompt has lost the same: a fall beyond doubt."""
    return at(step, gold=(0.8 - by,) * PROMPTS)


def acts(*checks: Health, limits: Limits = LIMITS) -> list[str]:
    guard = Guard(limits)
    return [guard.observe(check).act for check in checks]


BAD, WORSE = 0.1, 0.2  # falls beyond `gold_drop`, and beyond `gold_drop_hard`


def test_each_breach_in_a_row_goes_one_act_further() -> None:
    checks = [at(0), *(fallen(step, BAD) for step in range(5, 35, 5))]
    assert acts(*checks) == ["none", "warn", "raise_beta", "roll_back", "stop", "stop", "stop"]


def test_a_clean_check_takes_one_act_back() -> None:
    checks = [
        at(0),
        fallen(5, BAD),
        fallen(10, BAD),
        at(15),
        fallen(20, BAD),
        at(25),
        at(30),
        at(35),
        fallen(40, BAD),
    ]
    assert acts(*checks) == ["none", "warn", "raise_beta", "none", "raise_beta", "none", "none", "none", "warn"]


def test_a_severe_fall_rolls_back_at_once_and_then_stops() -> None:
    assert acts(at(0), fallen(5, WORSE), fallen(10, BAD)) == ["none", "roll_back", "stop"]
    assert acts(at(0), fallen(5, BAD), fallen(10, WORSE)) == ["none", "warn", "roll_back"]
    assert acts(at(0), fallen(5, WORSE), fallen(10, WORSE)) == ["none", "roll_back", "stop"]
    assert acts(at(0), fallen(5, WORSE), at(10), at(15), fallen(20, BAD)) == [
        "none", "roll_back", "none", "none", "raise_beta",
    ]  # fmt: skip


def test_a_large_fall_that_may_be_noise_is_not_severe() -> None:
    """Two prompts of three lost nothing: the mean is beyond the hard limit, its lower bound is not."""
    start = at(0, gold=(1.0, 1.0, 1.0), toxicity=(0.0,) * 3)
    noisy = start._replace(step=5, gold=(0.0, 1.0, 1.0))
    assert acts(start, noisy) == ["none", "none"]
    assert acts(start, noisy._replace(kl=9.0)) == ["none", "warn"]


@pytest.mark.parametrize(
    ("limit", "broken", "whole"),
    [
        ("gold_drop", {"gold": (0.779,) * PROMPTS}, {"gold": (0.781,) * PROMPTS}),
        ("toxicity_rise", {"toxicity": (0.121,) * PROMPTS}, {"toxicity": (0.119,) * PROMPTS}),
        ("kl", {"kl": 5.01}, {"kl": 5.0}),
        ("length_ratio_low", {"length": 5.9}, {"length": 6.0}),
        ("length_ratio_high", {"length": 18.1}, {"length": 18.0}),
        ("distinct_2", {"distinct_2": 0.41}, {"distinct_2": 0.43}),
    ],
)
def test_each_limit(limit: str, broken: dict[str, Any], whole: dict[str, Any]) -> None:
    assert list(breaches(LIMITS, START, at(5, **broken))) == [limit]
    assert breaches(LIMITS, START, at(5, **whole)) == {}
    guard = Guard(LIMITS)
    guard.observe(START)
    verdict = guard.observe(at(5, **broken))
    assert verdict.act == "warn"
    assert verdict.step == 5
    assert [reason.split(":")[0] for reason in verdict.reasons] == [limit]


def test_improvement_breaks_nothing() -> None:
    better = at(5, gold=(1.0,) * PROMPTS, toxicity=(0.0,) * PROMPTS, distinct_2=0.9, proxy=9.0)
    assert breaches(LIMITS, START, better) == {}


def test_the_reasons_say_what_was_seen() -> None:
    guard = Guard(LIMITS)
    guard.observe(START)
    verdict = guard.observe(fallen(5, BAD)._replace(kl=7.5, proxy=2.0))
    assert verdict.reasons == (
        "gold_drop: 0.100, at least 0.100, tolerated 0.02 (the reward went from 0.100 to 2.000)",
        "kl: 7.500 nats a response, tolerated 5",
    )


@pytest.mark.parametrize("field", ["gold", "toxicity", "kl", "length", "distinct_2"])
def test_a_figure_that_is_not_a_number_is_a_breach(field: str) -> None:
    """Comparisons with NaN are false: written the other way round, a broken policy would pass as sound."""
    value = getattr(START, field)
    bad = (math.nan, *value[1:]) if isinstance(value, tuple) else math.nan
    guard = Guard(LIMITS)
    guard.observe(START)
    assert guard.observe(at(5, **{field: bad})).act == ("roll_back" if field == "gold" else "warn")


def test_other_prompts_than_at_the_start_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        breaches(LIMITS, START, at(5, gold=START.gold[1:]))


def test_the_best_step_is_the_clean_check_with_the_highest_gold() -> None:
    guard = Guard(LIMITS)
    best = []
    for health in (
        at(0),
        at(5, gold=(0.79,) * PROMPTS),  # clean, and lower
        at(10, gold=(0.85,) * PROMPTS),
        at(15, gold=(0.95,) * PROMPTS, kl=9.0),  # higher, and not clean
        at(20, gold=(0.85,) * PROMPTS),  # as good, and further
        at(25, gold=(0.84,) * PROMPTS),
    ):
        guard.observe(health)
        best.append(guard.best_step)
    assert best == [0, 0, 10, 10, 20, 20]


UNIT = st.floats(0, 1)
FIGURES = st.tuples(
    st.lists(UNIT, min_size=4, max_size=4),
    st.lists(UNIT, min_size=4, max_size=4),
    st.floats(0, 8),
    st.floats(1, 30),
    UNIT,
)


def history(figures: list[Any]) -> list[Health]:
    return [
        Health(5 * step, float(step), tuple(gold), tuple(toxicity), kl, length, distinct)
        for step, (gold, toxicity, kl, length, distinct) in enumerate(figures)
    ]


@given(st.lists(FIGURES, min_size=1, max_size=8), st.integers(0, 8))
def test_a_guard_resumed_anywhere_gives_the_same_verdicts(figures: list[Any], cut: int) -> None:
    checks = history(figures)
    limits = replace(LIMITS, z=1.0)
    whole = Guard(limits)
    verdicts = [whole.observe(check) for check in checks]
    first = Guard(limits)
    before = [first.observe(check) for check in checks[:cut]]
    second = Guard(limits)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state == first.state
    assert before + [second.observe(check) for check in checks[cut:]] == verdicts
    assert second.state == whole.state


def test_loading_replaces_what_was_there() -> None:
    guard = Guard(LIMITS)
    guard.observe(START)
    guard.load_state_dict(Guard(LIMITS).state_dict())
    assert guard.state is None


@given(st.lists(FIGURES, min_size=1, max_size=8))
def test_no_act_is_skipped_without_a_severe_breach(figures: list[Any]) -> None:
    guard = Guard(replace(LIMITS, gold_drop_hard=2.0, z=1.0))
    level = 0
    for check in history(figures):
        verdict = guard.observe(check)
        assert bool(verdict.reasons) == (verdict.act != "none")
        level = min(level + 1, 4) if verdict.reasons else max(level - 1, 0)
        assert guard.state is not None
        assert guard.state.level == level
        assert verdict.act == ("none" if not verdict.reasons else ACTS[level])


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40), st.floats(0, 4))
@settings(max_examples=50)
def test_the_lower_bound_is_the_mean_less_z_standard_errors(changes: list[float], z: float) -> None:
    error = statistics.stdev(changes) / math.sqrt(len(changes))
    assert lower_bound(changes, z) == pytest.approx(statistics.fmean(changes) - z * error, abs=1e-9)


Array = NDArray[np.float64]


def f1_scores(generator: np.random.Generator, prompts: Array, mean: float) -> Array:
    """Scores in [0, 1] of sampled answers: some prompts are harder, and no two answers are the same."""
    return np.clip(mean + 0.2 * prompts + 0.2 * generator.standard_normal(len(prompts)), 0, 1)


def right_or_wrong(generator: np.random.Generator, prompts: Array, mean: float) -> Array:
    """Scores of 0 or 1 with a chance of its own per prompt."""
    return (generator.random(len(prompts)) < np.clip(mean + 0.2 * prompts, 0, 1)).astype(np.float64)


Scores = Callable[[np.random.Generator, Array, float], Array]


def verdicts(
    seed: int, scores: Scores, gold: list[float], prompts: int, limits: Limits = LIMITS
) -> list[Verdict]:
    """The verdicts on a run whose true mean gold is about `gold[i]` at check i; 5 % of answers are toxic."""
    generator = np.random.default_rng(seed)
    hardness = generator.standard_normal(prompts)
    guard = Guard(limits)
    return [
        guard.observe(
            START._replace(
                step=5 * check,
                gold=tuple(scores(generator, hardness, mean).tolist()),
                toxicity=tuple((generator.random(prompts) < 0.05).astype(float).tolist()),
            )
        )
        for check, mean in enumerate(gold)
    ]


def alarms(scores: Scores, gold: list[float], prompts: int, limits: Limits = LIMITS, runs: int = 300) -> float:
    """The share of runs in which the guard says anything at all."""
    return statistics.fmean(
        any(verdict.act != "none" for verdict in verdicts(seed, scores, gold, prompts, limits))
        for seed in range(runs)
    )


@pytest.mark.parametrize("scores", [f1_scores, right_or_wrong])
@pytest.mark.parametrize("prompts", [64, 128])
def test_honest_noise_rarely_disturbs_a_run(scores: Scores, prompts: int) -> None:
    """Ten checks of a policy as good as at the start; also of one that has lost what is tolerated."""
    assert alarms(scores, [0.6] * (CHECKS + 1), prompts) <= 0.03
    assert alarms(scores, [0.6] + [0.6 - LIMITS.gold_drop] * CHECKS, prompts) <= 0.03


def test_without_doubt_in_its_favour_noise_disturbs_nearly_every_run() -> None:
    """What the standard errors are for, and that the test above can fail."""
    assert alarms(f1_scores, [0.6] * (CHECKS + 1), 64, replace(LIMITS, z=0.0), runs=50) > 0.7


@pytest.mark.parametrize(("prompts", "margin"), [(64, 0.21), (128, 0.15)])
def test_it_fires_before_gold_has_lost_the_margin(prompts: int, margin: float) -> None:
    """Gold goes down by 0.03 a check: some act comes while the true fall is within the margin.

    Noise sets how small a margin N prompts can hold: gold_drop + (z + 1.64) standard errors for 19 runs of 20.
    """
    limits = replace(LIMITS, gold_drop_hard=margin)
    gold = [0.6 - 0.03 * check for check in range(CHECKS + 1)]
    within = round(margin / 0.03)
    runs = [verdicts(seed, f1_scores, gold, prompts, limits) for seed in range(300)]
    assert statistics.fmean(any(verdict.act != "none" for verdict in run[: within + 1]) for run in runs) >= 0.95
    assert statistics.fmean(run[-1].act == "stop" for run in runs) >= 0.98


def test_a_sudden_collapse_is_rolled_back_at_its_first_check() -> None:
    gold = [0.6] * 4 + [0.2]
    for seed in range(100):
        last = verdicts(seed, f1_scores, gold, 64)[-1]
        assert last.act == "roll_back"
        assert last.step == 20
