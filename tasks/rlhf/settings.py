"""The settings of PPO, as they stand in params.yaml."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tasks.lm.engine_settings import EngineSettings
from tasks.metrics.detector import Detector
from tasks.rlhf.guard import Limits
from tasks.stage import Section

Share = Annotated[float, Field(ge=0, le=1)]


class Kl(Section):
    """What leaving the reference costs: `beta` for each nat.

    With a `target` (nats a response), β is adapted towards it, slowly over `horizon` episodes; with null it
    stays.
    """

    beta: NonNegativeFloat
    target: PositiveFloat | None
    horizon: PositiveInt


class Rollouts(Section):
    """Each step has `episodes`, `answers` to each of its prompts; `batch_size` of them are answered at once.

    A prompt longer than `max_prompt_tokens` loses its middle. Sampling is at `temperature` from the whole
    distribution: that, and nothing narrower, is the policy. A response that has not ended after
    `max_response_tokens` is cut, and its score lowered by `unfinished_penalty`. With an `engine`
    (vLLM) that samples, and the policy reads what it answered.
    """

    episodes: PositiveInt
    answers: PositiveInt
    batch_size: PositiveInt
    max_prompt_tokens: PositiveInt
    max_response_tokens: PositiveInt
    temperature: PositiveFloat
    unfinished_penalty: NonNegativeFloat
    engine: EngineSettings | None

    @model_validator(mode="after")
    def _whole_prompts(self) -> Self:
        if self.episodes % self.answers:
            raise ValueError(f"{self.episodes} episodes are no multiple of {self.answers} answers to a prompt")
        return self


class Value(Section):
    """What the value function reads: the policy's own hidden states, or those of a `separate` model.

    That begins as the policy, or, with a `source`, as the reward model in that folder.
    """

    trunk: Literal["shared", "separate"]
    source: str | None

    @model_validator(mode="after")
    def _source_of_a_trunk(self) -> Self:
        if self.trunk == "shared" and self.source is not None:
            raise ValueError("a shared trunk has no source of its own; set trunk: separate, or source: null")
        return self


class Update(Section):
    """How the policy learns from the episodes of a step.

    They are read `epochs` times, in `minibatches` parts with an optimizer step each, `micro_batch_size` of
    them (null: all of a part) in one pass. What is shuffled into parts are single `episodes`, or `prompts` with
    all their answers: then a decoder reads each prompt of a part once. `gamma` and `lam` are those of
    generalised advantage estimation, `clip` and `value_clip` the ranges of the two losses; the value loss
    counts `value_weight` times. The learning rates of the policy and of the value function (its head, and its
    trunk if it has one of its own) fall linearly to 0; in the first `value_warmup` steps the policy stands
    still. Gradients are clipped to the norm `max_grad_norm`, and the step ends early once the policy is
    `stop_at_kl` nats a token (null: never) from the one that sampled.
    """

    learning_rate: PositiveFloat
    value_learning_rate: PositiveFloat
    value_warmup: NonNegativeInt
    epochs: PositiveInt
    minibatches: PositiveInt
    shuffle: Literal["episodes", "prompts"]
    micro_batch_size: PositiveInt | None
    gamma: Share
    lam: Share
    clip: PositiveFloat
    value_clip: PositiveFloat
    value_weight: NonNegativeFloat
    max_grad_norm: PositiveFloat
    stop_at_kl: PositiveFloat | None


class GuardLimits(Section):
    """What the guard tolerates, against the first look (tasks/rlhf/guard.py tells what each limit is)."""

    gold_drop: NonNegativeFloat
    gold_drop_hard: NonNegativeFloat
    toxicity_rise: NonNegativeFloat
    z: NonNegativeFloat
    kl: PositiveFloat
    length_ratio_low: NonNegativeFloat
    length_ratio_high: PositiveFloat
    distinct_2: NonNegativeFloat

    def as_limits(self) -> Limits:
        """The same numbers for the guard, which knows nothing of params."""
        return Limits(**self.model_dump())


class Watch(Section):
    """The guard: every `every` steps it looks at `prompts` held-out prompts.

    `toxicity` tells who says what is toxic there: not what the reward is made of. On a breach of `limits`
    it warns, then multiplies β by `raise_beta` (to `least_beta` at least), then goes back to the best state
    so far, then stops. A run it has stopped keeps that best state (`on_stop: keep`), or ends the stage
    without a model (`fail`).
    """

    every: PositiveInt
    prompts: Annotated[int, Field(ge=2)]
    toxicity: Detector
    limits: GuardLimits
    raise_beta: Annotated[float, Field(ge=1)]
    least_beta: NonNegativeFloat
    on_stop: Literal["keep", "fail"]


class ModelPart(Section):
    """The score of a sequence classifier: a folder or a hub id (at `revision`).

    `label` names one of a classifier's labels, whose logit is the score; null: a reward model's one score.
    Unless `squash` is null the score goes through the logistic function, which is ½ at a score of `squash`: the
    chance that people prefer the answer to one of that score (Bradley & Terry, 1952). At 0, where references
    score on average, that asks to be better than those; well below it, to be good enough. Then it counts for
    little which of two good answers a reward model likes more: there it errs most, and there it is exploited
    (arXiv 2502.18770).
    """

    kind: Literal["model"]
    source: Annotated[str, Field(min_length=1)]
    revision: str | None
    label: str | None
    squash: float | None
    batch_size: PositiveInt
    weight: float


class OraclePart(Section):
    """1 for an answer without an insult of the synthetic corpus, else 0."""

    kind: Literal["oracle"]
    weight: float


class LengthPart(Section):
    """The words of an answer beyond the first `free_words`: with a negative weight, a length penalty."""

    kind: Literal["length"]
    free_words: NonNegativeInt
    weight: float


Part = Annotated[ModelPart | OraclePart | LengthPart, Field(discriminator="kind")]
