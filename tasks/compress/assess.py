"""How good, how fast and how large a model is: what is told of a model and of what was made of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tasks.compress.lessons import Limits, greedy_answers
from tasks.data.records import Example
from tasks.lm.model import LanguageModel
from tasks.metrics.detector import Detector, scorer
from tasks.metrics.measures import quality, toxicity
from tasks.stage import Compute

SCORES = ("rougeL", "slot_f1", "exact_match", "toxicity_rate")


class Assessed(NamedTuple):
    """Scores of a model's greedy answers, from 0 to 1, and how fast it gave them."""

    scores: dict[str, float]  # of SCORES; slot_f1 only where any example has slots
    tokens_per_second: float


def assessor(
    detector: Detector, limits: Limits, compute: Compute
) -> Callable[[LanguageModel, Sequence[Example]], Assessed]:
    """Lets models answer the prompts of examples, and scores the answers.

    Raises ParamsError when the detector of toxicity cannot be opened.
    """
    chances = scorer(detector, limits.batch_size, compute)

    def assess(lm: LanguageModel, examples: Sequence[Example]) -> Assessed:
        began = time.perf_counter()
        answers = greedy_answers(lm, examples, limits)
        seconds = time.perf_counter() - began
        encoded = lm.tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = sum(len(ids) + 1 for ids in encoded)  # and the end
        found = quality(answers, [each.outputs for each in examples], [each.slots for each in examples])
        found |= toxicity(chances(answers), detector.toxic_from)
        return Assessed({name: found[name].value for name in SCORES if name in found}, tokens / seconds)

    return assess


def weight_bytes(lm: LanguageModel) -> int:
    """Bytes that the weights take, tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in lm.model.parameters())


def named(scores: Mapping[str, float], suffix: str) -> dict[str, float]:
    """The same scores under `NAME_SUFFIX`."""
    return {f"{name}_{suffix}": value for name, value in scores.items()}
