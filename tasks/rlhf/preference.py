"""Train a reward model on preferences, with TRL's RewardTrainer.

Added to it: a batch element is a prompt with all its completions and pairs, each completion read once, and the
loss of an element is the mean over its pairs (arXiv 2203.02155 eq. 1); both model families; a loss of the
language model, so that its states keep what they tell of an answer; what tasks/lm/train.py adds to
transformers' Trainer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from trl import RewardConfig, RewardTrainer

from tasks.data.records import Comparisons
from tasks.lm.classifier import Classifier, Text
from tasks.lm.schedule import Schedule
from tasks.lm.train import HeldOutLoss, Pair, Training, batches, fit, sizes_of, through
from tasks.rlhf.losses import preference_loss
from tasks.stage import Context

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Element:
    """The completions of one prompt, and which of two was preferred."""

    texts: tuple[Text, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def read(self) -> Pair:
        """Token ids of the prompt, and of all completions one behind the other."""
        return self.texts[0].prompt, [token for text in self.texts for token in text.answer]


def elements(classifier: Classifier, comparisons: Sequence[Comparisons]) -> list[Element]:
    """Each prompt with its completions as token ids."""
    prompts = [each.prompt for each in comparisons for _ in each.completions]
    answers = [answer for each in comparisons for answer in each.completions]
    texts = iter(classifier.encode(prompts, answers))
    return [Element(tuple(next(texts) for _ in each.completions), each.pairs) for each in comparisons]


def train_on_preferences(
    classifier: Classifier,
    rows: Sequence[Element],
    held_out: Sequence[Element],
    schedule: Schedule,
    learning_rate: float,
    language_loss: float,
    context: Context,
) -> Training:
    """Train what requires gradients in the classifier, in place. Resumes, and raises, as `train`.

    `language_loss` is the weight of the loss of the preferred answers' tokens beside that of the pairs.
    """
    sizes = sizes_of([row.read for row in rows], schedule)
    rows_at_once = schedule.rows_on_each(context.place.processes)
    plan = batches(sizes, schedule, context.seed, context.place.processes, sort_responses=True)

    def trainer(arguments: _Arguments) -> Trainer:
        return _PreferenceTrainer(
            classifier=classifier,
            language_loss=language_loss,
            place=context.place,
            held_out_loss=lambda: mean_loss(classifier, held_out, rows_at_once),
            model=classifier.model,
            args=arguments,
            processing_class=classifier.tokenizer,
            train_dataset=Dataset.from_dict({"batch": list(range(len(plan)))}),
            data_collator=lambda items: _collate(
                classifier, [rows[draw % len(rows)] for draw in plan[items[0]["batch"]]]
            ),
        )

    return fit(trainer, _Arguments, plan, sizes, schedule, learning_rate, context)


class Losses(NamedTuple):
    """The losses of a batch; scalars."""

    preference: Tensor  # the mean over its elements of the mean over each one's pairs
    language: Tensor | None  # nats a token of the preferred answers; None: the classifier has no language head


def losses(classifier: Classifier, batch: dict[str, Tensor]) -> Losses:
    """The losses of a collated batch (arXiv 2203.02155 eq. 1; 2406.10216 §3.2, on the preferred answers)."""
    texts = {name: tensor for name, tensor in batch.items() if name not in ("better", "worse", "element")}
    scores, logprobs = classifier.read(texts)
    differences = scores[batch["better"]] - scores[batch["worse"]]
    counts = batch["element"].bincount().tolist()
    each = [preference_loss(part) for part in torch.split(differences, counts)]
    language = None if logprobs is None else -logprobs[batch["better"]].mean()
    return Losses(torch.stack(each).mean(), language)


def mean_loss(classifier: Classifier, rows: Sequence[Element], batch_size: int) -> float:
    """The loss of the pairs of all rows, without gradients."""
    was_training = classifier.model.training
    classifier.model.eval()
    total = 0.0
    with torch.no_grad():  # as in tasks.lm.respond.likelihoods
        for at in range(0, len(rows), batch_size):
            some = rows[at : at + batch_size]
            batch = {
                name: each.to(classifier.model.device) for name, each in _collate(classifier, some).items()
            }
            found = through(classifier.model, partial(losses, classifier, batch))
            total += float(found.preference) * len(some)
    classifier.model.train(was_training)
    return total / len(rows)


@dataclass
class _Arguments(RewardConfig):  # type: ignore[misc]
    """TRL would compute activations twice to save memory, and asks for it under a name that is deprecated."""

    activation_checkpointing: bool | None = False


class _PreferenceTrainer(HeldOutLoss, RewardTrainer):  # type: ignore[misc]
    loss_is_scaled_for_ga = False

    def __init__(self, *, classifier: Classifier, language_loss: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._classifier, self._language_loss = classifier, language_loss

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        found = through(model, partial(losses, self._classifier, inputs))
        if found.language is None:
            return found.preference
        weight = self._language_loss
        if self._place.processes > 1:  # a mean over all pairs, of which each process may have its own number
            pairs = self._place.gather(len(inputs["better"]))
            weight *= len(inputs["better"]) * len(pairs) / sum(pairs)
        return found.preference + weight * found.language

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """A checkpoint needs none."""


def _collate(classifier: Classifier, rows: Sequence[Element]) -> dict[str, Tensor]:
    """A batch for `Classifier.read`, with the places of the pairs in it and the element of each pair."""
    better, worse, element, start = [], [], [], 0
    for number, row in enumerate(rows):
        better += [start + first for first, _ in row.pairs]
        worse += [start + second for _, second in row.pairs]
        element += [number] * len(row.pairs)
        start += len(row.texts)
    return classifier.collate([text for row in rows for text in row.texts]) | {
        "better": torch.tensor(better),
        "worse": torch.tensor(worse),
        "element": torch.tensor(element),
    }
