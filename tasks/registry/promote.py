"""The section `promote`: what a version must show before it takes the alias `champion`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tasks.stage import Section


class Score(Section):
    """A score of the main task: the bound it must keep, and how much worse than the champion's it may be."""

    score: str
    better: Literal["higher", "lower"]
    bound: float
    margin: NonNegativeFloat


class Forgetting(Section):
    """A score of every other task, and how far it may lie below that of a variant of the same evaluation (the
    model before tuning), and below that of the champion."""

    score: str
    against: str
    margin: NonNegativeFloat
    champion_margin: NonNegativeFloat


class Cost(Section):
    """The most that is allowed, and the largest multiple of what the champion needs."""

    bound: PositiveFloat
    ratio: PositiveFloat


class Latency(Cost):
    """Seconds an answer, over `prompts` prompts, each asked `repeats` times and alone."""

    prompts: Annotated[int, Field(ge=2)]
    repeats: PositiveInt
    bootstrap_samples: PositiveInt


class Params(Section):
    """The section `promote` of params.yaml."""

    scores: Annotated[list[Score], Field(min_length=1)]
    forgetting: Forgetting
    megabytes: Cost
    seconds: Latency
