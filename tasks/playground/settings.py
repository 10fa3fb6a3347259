"""The decoding settings of the page: what each does, what it may be, and what `generate` is told.

Every setting is a field of transformers' GenerationConfig, but for the seed.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from tasks.stage import UserError

Strategy = Literal["Greedy", "Sampling", "Beam search"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
LARGEST_SEED = 2**32 - 1


class Setting(NamedTuple):
    """One number that a person can change.

    It lies in low … high; `open_low` leaves out the lower end itself. `neutral` changes nothing. Without a
    `step` it is typed rather than dragged, without a `strategy` it belongs to all of them.
    """

    name: str
    what: str
    low: float
    high: float
    neutral: float
    whole: bool
    step: float | None = None
    open_low: bool = False
    strategy: Strategy | None = None


SETTINGS = (
    Setting("max_new_tokens", "The answer is cut off after so many tokens.", 1, 2048, 40, True),
    Setting("min_new_tokens", "The answer may not end before it has so many tokens; 0: whenever it likes.",
            0, 2048, 0, True),
    Setting("repetition_penalty", "Above 1, tokens that came before (of a causal model's prompt too) become "
            "less likely; 1: off.", 0.5, 2.0, 1.0, False, step=0.05),
    Setting("no_repeat_ngram_size", "No run of so many tokens may come twice; 0: off.", 0, 20, 0, True),
    Setting("temperature", "Below 1 the likely tokens gain, above 1 the unlikely ones; 1: as the model says.",
            0.05, 3.0, 1.0, False, step=0.05, strategy="Sampling"),
    Setting("top_k", "Only so many of the likeliest tokens are left; 0: all.", 0, 100, 0, True, step=1,
            strategy="Sampling"),
    Setting("top_p", "Only the likeliest tokens that together reach this probability are left; 1: all.",
            0.0, 1.0, 1.0, False, step=0.01, open_low=True, strategy="Sampling"),
    Setting("min_p", "Only tokens that have this share of the likeliest one's probability are left; 0: all.",
            0.0, 1.0, 0.0, False, step=0.01, strategy="Sampling"),
    Setting("seed", "The same seed draws the same answer again.", 0, LARGEST_SEED, 1, True,
            strategy="Sampling"),
    Setting("num_beams", "So many beginnings of answers are kept side by side; the likeliest whole one wins.",
            2, 16, 4, True, strategy="Beam search"),
    Setting("length_penalty", "Above 0 long answers win more often, below 0 short ones.", -5.0, 5.0, 1.0, False,
            strategy="Beam search"),
)  # fmt: skip
BY_NAME = {setting.name: setting for setting in SETTINGS}


class Settings(NamedTuple):
    """What was asked for, checked: the value of every setting."""

    strategy: Strategy
    max_new_tokens: int
    min_new_tokens: int
    repetition_penalty: float
    no_repeat_ngram_size: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    num_beams: int
    length_penalty: float

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn by chance."""
        return self.strategy == "Sampling"

    def generation(self) -> dict[str, Any]:
        """Fields of GenerationConfig. Those of sampling are always named: some have defaults that cut."""
        found: dict[str, Any] = {
            "do_sample": self.samples,
            "num_beams": 1,
            "max_new_tokens": self.max_new_tokens,
        }
        for name in ("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"):
            value = self._asdict()[name]
            if value != BY_NAME[name].neutral:
                found[name] = value
        if self.samples:
            found |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            if self.min_p:
                found["min_p"] = self.min_p
        if self.strategy == "Beam search":
            found |= {"num_beams": self.num_beams, "length_penalty": self.length_penalty}
        return found


def check(strategy: str, values: Mapping[str, Any]) -> Settings:
    """The settings that a person asked for; those of other strategies are not looked at.

    Raises UserError that says in one line which one is wrong and what it may be.
    """
    known = next((name for name in STRATEGIES if name == strategy), None)
    if known is None:
        raise UserError(f"strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}")
    used: dict[str, Any] = {
        setting.name: _checked(setting, values[setting.name])
        if setting.strategy in (None, strategy)
        else setting.neutral
        for setting in SETTINGS
    }
    if used["min_new_tokens"] > used["max_new_tokens"]:
        raise UserError(
            f"min_new_tokens is {used['min_new_tokens']} and max_new_tokens {used['max_new_tokens']}: "
            "an answer cannot be longer than it may be; lower the first or raise the second"
        )
    return Settings(strategy=known, **used)


def _checked(setting: Setting, value: Any) -> Any:
    low, high = (f"{end:,}" if setting.whole else f"{end:g}" for end in (setting.low, setting.high))
    kind = "a whole number" if setting.whole else "a number"
    wanted = f"it must be {kind} {f'above {low}, up to' if setting.open_low else f'from {low} to'} {high}"
    if value is None:
        raise UserError(f"{setting.name} is empty; {wanted}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{setting.name} is {value!r}; {wanted}")
    too_low = value < setting.low or (setting.open_low and value == setting.low)
    if too_low or value > setting.high or (setting.whole and value != int(value)):
        raise UserError(f"{setting.name} is {value:g}; {wanted}")
    return int(value) if setting.whole else float(value)


def first_values(generation: Mapping[str, Any]) -> tuple[Strategy, dict[str, float]]:
    """The strategy and values that fields of GenerationConfig amount to, for the page to begin with."""
    values = {setting.name: generation.get(setting.name, setting.neutral) for setting in SETTINGS}
    strategy: Strategy = "Sampling" if generation.get("do_sample") else "Greedy"
    if generation.get("num_beams", 1) > 1:
        return "Beam search", values
    return strategy, values | {"num_beams": BY_NAME["num_beams"].neutral}
