"""Train a reward model on preferences, with TRL's RewardTrainer.

Added to it: a batch element is a prompt with all its completions and pairs, each completion read once, and the
loss of an element is the mean over its pairs (arXiv 2203.02155 eq. 1); both model families; what
tasks/lm/train.py adds to transformers' Trainer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from trl import RewardConfig, RewardTrainer

from tasks.data.records import Comparisons
from tasks.lm.classifier import Classifier, Text
from tasks.lm.schedule import Schedule
from tasks.lm.train import HeldOutLoss, Training, batches, fit
from tasks.rlhf.losses import preference_loss
from tasks.stage import Context

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Element:
    """The completions of one prompt, and which of two was preferred."""

    texts: tuple[Text, ...]
    pairs: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """Tokens, the prompt counted once."""
        return len(self.texts[0].prompt) + sum(len(text.answer) for text in self.texts)


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
    context: Context,
) -> Training:
    """Train what requires gradients in the classifier, in place. Resumes, and raises, as `train`."""
    lengths = [len(row) for row in rows]
    plan = batches(lengths, schedule, context.seed)

    def trainer(arguments: _Arguments) -> Trainer:
        return _PreferenceTrainer(
            classifier=classifier,
            held_out_loss=lambda: mean_loss(classifier, held_out, schedule.rows_at_once),
            model=classifier.model,
            args=arguments,
            processing_class=classifier.tokenizer,
            train_dataset=Dataset.from_dict({"batch": list(range(len(plan)))}),
            data_collator=lambda items: _collate(
                classifier, [rows[draw % len(rows)] for draw in plan[items[0]["batch"]]]
            ),
        )

    return fit(trainer, _Arguments, plan, lengths, schedule, learning_rate, context)


def loss_of(classifier: Classifier, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the elements of a collated batch of the mean over each one's pairs."""
    texts = {name: tensor for name, tensor in batch.items() if name not in ("better", "worse", "element")}
    scores = classifier.logits(texts)
    differences = scores[batch["better"]] - scores[batch["worse"]]
    counts = batch["element"].bincount().tolist()
    each = [preference_loss(part) for part in torch.split(differences, counts)]
    return torch.stack(each).mean()


def mean_loss(classifier: Classifier, rows: Sequence[Element], batch_size: int) -> float:
    """The loss over all rows, without gradients."""
    was_training = classifier.model.training
    classifier.model.eval()
    total = 0.0
    with torch.inference_mode():
        for at in range(0, len(rows), batch_size):
            some = rows[at : at + batch_size]
            batch = {
                name: each.to(classifier.model.device) for name, each in _collate(classifier, some).items()
            }
            total += float(loss_of(classifier, batch)) * len(some)
    classifier.model.train(was_training)
    return total / len(rows)


@dataclass
class _Arguments(RewardConfig):  # type: ignore[misc]
    """TRL would compute activations twice to save memory, and asks for it under a name that is deprecated."""

    activation_checkpointing: bool | None = False


class _PreferenceTrainer(HeldOutLoss, RewardTrainer):  # type: ignore[misc]
    loss_is_scaled_for_ga = False

    def __init__(self, *, classifier: Classifier, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._classifier = classifier

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        return loss_of(self._classifier, inputs)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """A checkpoint needs none."""


def _collate(classifier: Classifier, rows: Sequence[Element]) -> dict[str, Tensor]:
    """A batch for `Classifier.logits`, with the places of the pairs in it and the element of each pair."""
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
