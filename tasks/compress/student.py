"""Train a student on labels and on what its teacher foresees, with the machinery of tasks/lm/train.py."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tasks.compress.distillation import SoftTargets, distillation_loss
from tasks.compress.teacher import Foreseen
from tasks.lm.model import LanguageModel
from tasks.lm.respond import IGNORED, collate, model_inputs
from tasks.lm.schedule import Schedule
from tasks.lm.train import HeldOutLoss, Pair, Training, batches, fit, mean_loss
from tasks.stage import Context


def train_student(
    student: LanguageModel,
    pairs: Sequence[Pair],
    foreseen: Foreseen,
    held_out: Sequence[Pair],
    alpha: float,
    temperature: float,
    schedule: Schedule,
    learning_rate: float,
    context: Context,
) -> Training:
    """Train the student in place on `pairs`, of which `foreseen` says what the teacher makes of them.

    `alpha` is the weight of the soft targets. The held-out loss is that of the labels alone. Resumes, and
    raises, as `train`.
    """
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    plan = batches(lengths, schedule, context.seed)

    def trainer(arguments: TrainingArguments) -> Trainer:
        return _StudentTrainer(
            alpha=alpha,
            temperature=temperature,
            held_out_loss=lambda: mean_loss(student, held_out, schedule.rows_at_once),
            model=student.model,
            args=arguments,
            train_dataset=Dataset.from_dict({"batch": list(range(len(plan)))}),
            data_collator=lambda items: _lesson(
                student, pairs, foreseen, [draw % len(pairs) for draw in plan[items[0]["batch"]]]
            ),
        )

    return fit(trainer, TrainingArguments, plan, lengths, schedule, learning_rate, context)


class _StudentTrainer(HeldOutLoss):
    """The loss is the mean over all response tokens of the global batch."""

    loss_is_scaled_for_ga = True

    def __init__(self, *, alpha: float, temperature: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._alpha, self._temperature = alpha, temperature

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        inputs = dict(inputs)
        labels, _ = inputs.pop("shift_labels"), inputs.pop("labels")
        targets = SoftTargets(inputs.pop("soft_ids"), inputs.pop("soft_logprobs"))
        real = labels != IGNORED
        logits = model(**inputs).logits[:, : labels.shape[1]][real]
        total = distillation_loss(logits, labels[real], targets, self._alpha, self._temperature)
        processes = self.accelerator.num_processes  # which average their gradients
        loss: Tensor = total * processes / num_items_in_batch
        return loss


def _lesson(
    student: LanguageModel, pairs: Sequence[Pair], foreseen: Foreseen, rows: Sequence[int]
) -> dict[str, Any]:
    """Model inputs; `shift_labels` tells the Trainer that every label counts, the first one too."""
    inputs = model_inputs(student, collate(student, *zip(*(pairs[row] for row in rows), strict=True)))
    targets = foreseen.of(rows)
    return {
        **inputs,
        "shift_labels": inputs["labels"],
        "soft_ids": targets.ids,
        "soft_logprobs": targets.logprobs,
    }
