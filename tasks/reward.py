"""The stage `reward`: a model that tells how much people would like an answer.

A sequence classifier with one output, on the weights of a language model of this pipeline or of any encoder,
trained on pairs of completions (arXiv 2203.02155 §3.5). Held against what length, words alone and shuffled
labels give.

    python -m tasks.reward
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tasks.data.records import Comparisons, read_comparisons
from tasks.lm.schedule import Schedule
from tasks.stage import Context, Section, run_stage
from tasks.stage.fingerprint import hash_file

if TYPE_CHECKING:
    from tasks.lm.classifier import Classifier
    from tasks.lm.train import Training


class Start(Section):
    """What the classifier is built from: a language model or an encoder, a folder or hub id (at `revision`)."""

    source: Annotated[str, Field(min_length=1)]
    revision: str | None


class Full(Section):
    """Every parameter is trained."""

    learning_rate: PositiveFloat


class Lora(Section):
    """The head, and low-rank updates scaled by `alpha` / `r` of `target_modules` (null: PEFT's choice)."""

    learning_rate: PositiveFloat
    r: PositiveInt
    alpha: PositiveInt
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: list[str] | None


class Params(Section):
    """The section `reward` of params.yaml; the section named like the `method` is used.

    To the score that is learnt, `likelihood` times the mean log-likelihood of the answer's tokens is added, and
    `language_loss` is the weight of the language model's loss on the preferred answers, without which training
    would forget what makes them likely. A longer prompt loses its middle, a longer answer its end. The same
    training is done once more, on labels that say nothing, with `shuffled_control` prompts (0: not at all).
    Intervals are from `bootstrap_samples` samples of the prompts.
    """

    model: Start
    likelihood: NonNegativeFloat
    language_loss: NonNegativeFloat
    method: Literal["full", "lora"]
    max_prompt_tokens: PositiveInt
    max_response_tokens: PositiveInt
    batch_size: PositiveInt
    schedule: Schedule
    full: Full
    lora: Lora
    shuffled_control: NonNegativeInt
    bootstrap_samples: PositiveInt

    @model_validator(mode="after")
    def _a_language_head(self) -> Self:
        if self.language_loss and not self.likelihood:
            raise ValueError("language_loss is of the likelihood: without likelihood, set it to 0")
        return self


def reward(
    params: Params, train_data: Path, test_data: Path, model: Path, reports: Path, context: Context
) -> Mapping[str, Any]:
    """Write the reward model to `model`, and the reports; return the metrics.

    Its scores are shifted so that the references of the training prompts score 0 on average, or the preferred
    completions where there are no references.
    """
    import numpy as np

    from tasks.lm.classifier import save_classifier, scores
    from tasks.lm.train import forget_checkpoints
    from tasks.metrics import preferences
    from tasks.metrics.bootstrap import interval, resamples
    from tasks.rlhf.preference_report import write_report

    train, test = read_comparisons(train_data), read_comparisons(test_data)
    context.track.dataset("comparisons", train_data, hash_file(train_data), len(train))
    classifier, training = _trained(params, train, test, context)
    trainable = classifier.trainable_parameters
    worth = scores(classifier, *zip(*_demonstrations(train), strict=True), batch_size=params.batch_size)
    shift = sum(worth) / len(worth)
    classifier = classifier.shifted(shift)

    def margins(by: "Classifier") -> preferences.Array:
        prompts = [each.prompt for each in test for _ in each.completions]
        answers = [text for each in test for text in each.completions]
        return preferences.margins(test, scores(by, prompts, answers, batch_size=params.batch_size))

    margin = margins(classifier)
    controls = {
        "length_only": preferences.length_margins(train, test),
        "bag_of_words": preferences.word_margins(train, test),
    }
    if params.shuffled_control:
        some = _shuffled(train[: params.shuffled_control], context.seed)
        once = params.model_copy(update={"schedule": params.schedule.model_copy(update={"evaluations": 1})})
        shuffled, _ = _trained(once, some, test, _beside(context, "shuffled"))
        controls["shuffled"] = margins(shuffled)
    context.first_alone()
    flipped = np.array([flip for each in test for flip in each.flipped])
    draws = resamples(len(test), params.bootstrap_samples, context.seed)
    prompts = preferences.prompts_of(test)
    metrics: dict[str, Any] = {}
    found = {"accuracy": margin, "accuracy_unflipped": np.where(flipped, -margin, margin)}
    for key, each in (found | {f"accuracy_{name}": each for name, each in controls.items()}).items():
        value, low, high = interval(preferences.accuracy(each, prompts), draws)
        metrics |= {key: value, f"{key}_low": low, f"{key}_high": high}
    kinds = preferences.by_kind(test, margin)
    metrics |= {
        "accuracy_ceiling": 1 - float(flipped.mean()),
        "accuracy_by_kind": {kind: value for kind, (value, _) in kinds.items()},
        "calibration_error": preferences.calibration_error(margin),
        "mean_margin": float(margin.mean()),
        "pairs": len(margin),
        "prompts": len(test),
        "shift": shift,
        "loss_before": training.evaluations[0]["eval_loss"],
        "loss_after": training.evaluations[-1]["eval_loss"],
        "parameters": classifier.parameters,
        "trainable_parameters": trainable,
        "steps": training.steps,
    }
    save_classifier(classifier, model)
    write_report(reports, metrics, training, margin, preferences.reliability(margin), kinds)
    context.track.figure("reward", reports / "reward.png")
    context.track.metrics({"seconds": training.seconds, "peak_memory_mb": training.peak_memory / 2**20})
    forget_checkpoints(context)
    forget_checkpoints(_beside(context, "shuffled"))
    return metrics


def _trained(
    params: Params, train: Sequence[Comparisons], test: Sequence[Comparisons], context: Context
) -> "tuple[Classifier, Training]":
    import torch

    from tasks.lm.classifier import new_classifier, with_lora
    from tasks.rlhf.preference import elements, train_on_preferences

    torch.manual_seed(context.seed)
    start = params.model
    classifier = new_classifier(start.source, context.compute, start.revision, params.likelihood)
    classifier = classifier.with_limits(params.max_prompt_tokens, params.max_response_tokens)
    learning_rate = params.full.learning_rate
    if params.method == "lora":
        learning_rate = params.lora.learning_rate
        classifier = with_lora(classifier, params.lora.model_dump())
    rows, held_out = elements(classifier, train), elements(classifier, test)
    training = train_on_preferences(
        classifier, rows, held_out, params.schedule, learning_rate, params.language_loss, context
    )
    return classifier, training


def _shuffled(comparisons: Sequence[Comparisons], seed: int) -> list[Comparisons]:
    """The same pairs, each labelled by the toss of a coin."""
    coin = random.Random(seed)
    return [
        each.model_copy(
            update={"pairs": tuple(pair if coin.random() < 0.5 else pair[::-1] for pair in each.pairs)}
        )
        for each in comparisons
    ]


def _demonstrations(comparisons: Sequence[Comparisons]) -> list[tuple[str, str]]:
    """(prompt, reference) of every prompt; without references, (prompt, preferred) of every pair."""
    references = [(each.prompt, each.reference) for each in comparisons if each.reference is not None]
    return references or [
        (each.prompt, each.completions[better]) for each in comparisons for better, _ in each.pairs
    ]


def _beside(context: Context, name: str) -> Context:
    """The context of a second training in the same stage."""
    return replace(context, work=context.work / name)


if __name__ == "__main__":
    run_stage(
        "reward",
        Params,
        lambda params, context: reward(
            params,
            Path("data/feedback/train.jsonl"),
            Path("data/feedback/test.jsonl"),
            Path("models/reward"),
            Path("reports/reward"),
            context,
        ),
        trains=True,
    )
