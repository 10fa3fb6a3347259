"""What an answer is worth: a weighted sum of parts, each of which is logged by itself.

A part is a model (the reward model of this pipeline, or any text classifier with a named label), the corpus
oracle, or the length of the answer. A reward is anything that maps examples and answers to `Scores`.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from tasks.data.records import Example
from tasks.data.synthetic import is_toxic
from tasks.rlhf.rollout import Reward, Scores
from tasks.rlhf.settings import LengthPart, ModelPart, OraclePart, Part
from tasks.stage import Compute

Score = Callable[[Sequence[Example], Sequence[str]], list[float]]


def weighted_sum(parts: Mapping[str, Part], compute: Compute) -> Reward:
    """The reward that adds up `parts`. Raises UserError when a model cannot be opened."""
    scores = {name: (part.weight, _score(part, compute)) for name, part in parts.items()}

    def reward(examples: Sequence[Example], answers: Sequence[str]) -> Scores:
        found = {
            name: [weight * value for value in score(examples, answers)]
            for name, (weight, score) in scores.items()
        }
        return Scores([sum(values) for values in zip(*found.values(), strict=True)], found)

    return reward


def _score(part: Part, compute: Compute) -> Score:
    if isinstance(part, OraclePart):
        return lambda _, answers: [0.0 if is_toxic(answer) else 1.0 for answer in answers]
    if isinstance(part, LengthPart):
        free = part.free_words
        return lambda _, answers: [float(max(len(answer.split()) - free, 0)) for answer in answers]
    return _model_score(part, compute)


def _model_score(part: ModelPart, compute: Compute) -> Score:
    from tasks.lm.classifier import load_classifier, scores

    classifier = load_classifier(part.source, compute, part.revision)

    def score(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        prompts = [example.prompt for example in examples]
        found = scores(classifier, prompts, answers, batch_size=part.batch_size, label=part.label)
        return found if part.squash is None else [_logistic(value - part.squash) for value in found]

    return score


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else 1 - 1 / (1 + math.exp(value))
