"""The metrics as `evaluate.Metric` modules that work without a network.

`evaluate.load("rouge")` fetches a script from the hub. These classes are made directly instead and used like
any other module:

    Rouge().compute(predictions=["testing one two"], references=["testing one"])

They are for use outside the pipeline. The stage calls the functions beneath them, which also give intervals and
spare it the five seconds that importing `evaluate` takes (it imports every transformers pipeline).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import evaluate
from datasets import Features, Value
from datasets import List as ListOf

from tasks.metrics import bleu as bleu_of
from tasks.metrics.bootstrap import ratio
from tasks.metrics.exact_match import exact_match
from tasks.metrics.rouge import rouge
from tasks.metrics.slots import slot_counts
from tasks.metrics.toxicity import Scorer

References = Sequence[str] | Sequence[Sequence[str]]


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """`rouge1`, `rouge2`, `rougeL`, `rougeLsum`: mean F-measures in 0…1, with stemming."""

    def _info(self) -> Any:
        return _with_references(self)

    def _compute(self, predictions: Sequence[str], references: References) -> dict[str, float]:
        return {name: float(scores.mean()) for name, scores in rouge(predictions, _lists(references)).items()}


class Bleu(evaluate.Metric):  # type: ignore[misc]
    """`bleu`: sacrebleu's corpus score in 0…1, and its `signature`."""

    def _info(self) -> Any:
        return _with_references(self)

    def _compute(self, predictions: Sequence[str], references: References) -> dict[str, Any]:
        targets = _lists(references)
        sums = bleu_of.counts(predictions, targets).sum(axis=0, keepdims=True)
        return {"bleu": float(bleu_of.bleu(sums)[0]), "signature": bleu_of.signature(targets)}


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """`exact_match`: the share of answers equal to one of their references, white space aside."""

    def _info(self) -> Any:
        return _with_references(self)

    def _compute(self, predictions: Sequence[str], references: References) -> dict[str, float]:
        return {"exact_match": float(exact_match(predictions, _lists(references)).mean())}


class SlotF1(evaluate.Metric):  # type: ignore[misc]
    """`slot_f1`: micro F1 of the facts in the answers; takes `slots=`, one mapping name → value per example."""

    def _info(self) -> Any:
        return _with_references(self)

    def _compute(
        self, predictions: Sequence[str], references: References, slots: Sequence[Mapping[str, str]]
    ) -> dict[str, float]:
        sums = slot_counts(predictions, _lists(references), slots).sum(axis=0, keepdims=True)
        return {"slot_f1": float(ratio(sums)[0])}


class Toxicity(evaluate.Metric):  # type: ignore[misc]
    """`toxicity_rate` and `toxicity_mean`; takes `scorer=` (see `tasks.metrics.toxicity`) and `toxic_from=`."""

    def _info(self) -> Any:
        return _described(self, Features({"predictions": Value("string")}))

    def _compute(self, predictions: Sequence[str], scorer: Scorer, toxic_from: float) -> dict[str, float]:
        scores = scorer(predictions)
        return {
            "toxicity_rate": float((scores >= toxic_from).mean()),
            "toxicity_mean": float(scores.mean()),
        }


def _with_references(module: evaluate.Metric) -> Any:
    text = Value("string")
    several = Features({"predictions": text, "references": ListOf(text)})
    return _described(module, [Features({"predictions": text, "references": text}), several])


def _described(module: evaluate.Metric, features: Features | list[Features]) -> Any:
    return evaluate.MetricInfo(description=type(module).__doc__, citation="", features=features)


def _lists(references: References) -> list[Sequence[str]]:
    return [[reference] if isinstance(reference, str) else reference for reference in references]
