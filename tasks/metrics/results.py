"""From what the models said to what metrics/evaluate.json holds."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from tasks.data.records import Example
from tasks.metrics import measures
from tasks.metrics.bleu import signature
from tasks.metrics.bootstrap import Array
from tasks.metrics.measures import Measures, perplexity, quality, subset
from tasks.metrics.report import TASK_SCORES, WITH_INTERVAL
from tasks.metrics.surface import distinct_2


class Answers(NamedTuple):
    """What one variant answered to N prompts, and how likely it found the references."""

    texts: list[str]
    nll: Array  # [N] of the whole reference
    tokens: Array  # [N]


class Answered(NamedTuple):
    """Everything that was said."""

    main: dict[str, Answers]  # by variant
    baselines: dict[str, list[str]]  # by baseline, on the main task too
    tasks: dict[str, dict[str, list[str]]]  # by variant, by other task
    decoding: dict[str, list[str]]  # by setting, to the first prompts of the main task


def results(
    test: Mapping[str, Sequence[Example]],
    answered: Answered,
    tuned: str,
    toxicity: Callable[[Sequence[str]], Measures],
    samples: int,
    seed: int,
    advance: Callable[[], object],
) -> dict[str, Any]:
    """Score all answers to `test`, examples by task, the main one first.

    `tuned` is the variant that is compared with every other one. `samples` bootstrap samples make an interval.
    `advance` is called once for each set of answers scored.
    """
    task, main = next(iter(test.items()))
    flat = partial(measures.flat, samples=samples, seed=seed)

    def scored(texts: Sequence[str], examples: Sequence[Example]) -> Measures:
        advance()
        references, slots = [example.outputs for example in examples], [example.slots for example in examples]
        return quality(texts, references, slots)

    def in_full(texts: Sequence[str]) -> Measures:
        return scored(texts, main[: len(texts)]) | toxicity(texts)

    def numbers(scores: Measures, texts: Sequence[str]) -> dict[str, float]:
        return flat(scores) | {"distinct_2": round(distinct_2(texts), 6)}

    variants = {
        name: in_full(answers.texts) | {"perplexity": perplexity(answers.nll, answers.tokens)}
        for name, answers in answered.main.items()
    }
    baselines = {name: in_full(texts) for name, texts in answered.baselines.items()}
    decoding = {name: in_full(texts) for name, texts in answered.decoding.items()}
    tasks = {
        name: {task: variants[name], **{other: scored(texts, test[other]) for other, texts in by_task.items()}}
        for name, by_task in answered.tasks.items()
    }
    parts = {
        "held_out": [row for row, example in enumerate(main) if example.split == "test"],
        "seen": [row for row, example in enumerate(main) if example.split != "test"],
    }
    found = {
        **{name: numbers(scores, answered.main[name].texts) for name, scores in variants.items()},
        "about": {
            "bleu_signature": signature([example.outputs for example in main]),
            "decoding_examples": len(next(iter(answered.decoding.values()))),
            "examples": len(main),
            "task": task,
            "tuned": tuned,
        },
        "baselines": {name: numbers(scores, answered.baselines[name]) for name, scores in baselines.items()},
        "decoding": {name: numbers(scores, answered.decoding[name]) for name, scores in decoding.items()},
        "differences": {
            name: measures.differences(_only(WITH_INTERVAL, variants[tuned]), scores, samples, seed)
            for name, scores in (variants | baselines).items()
            if name != tuned
        },
        "splits": {
            name: {part: flat(subset(_only(TASK_SCORES, scores), rows)) for part, rows in parts.items()}
            for name, scores in variants.items()
            if all(parts.values())
        },
        "tasks": {
            name: {task: flat(_only(TASK_SCORES, scores)) for task, scores in by_task.items()}
            for name, by_task in tasks.items()
        },
    }
    return _in_order(found)


def _in_order(found: dict[str, Any]) -> dict[str, Any]:
    """As the file will have it, so that a report made now and one made from the file are the same."""
    return {key: _in_order(value) if isinstance(value, dict) else value for key, value in sorted(found.items())}


def _only(names: Sequence[str], scores: Measures) -> Measures:
    return {name: scores[name] for name in names if name in scores}
