"""Train a student on labels and on what its teacher foresees, with the machinery of tasks/lm/train.py."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tasks.compress.distillation import SoftTargets, distillation_loss, state_loss
from tasks.compress.teacher import Foreseen
from tasks.lm.collate import Batch, collate
from tasks.lm.model import LanguageModel
from tasks.lm.respond import IGNORED, States, hidden_states, model_inputs, output_states
from tasks.lm.schedule import Schedule
from tasks.lm.train import HeldOutLoss, Pair, Training, batches, fit, mean_loss, sizes_of
from tasks.stage import Context

# The tensors of a batch, as a Trainer moves them to where the model is.
BATCH = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")


class Weights(NamedTuple):
    """`alpha` of the soft targets, at `temperature`, beside the labels.

    `states` is that of the distance of hidden states, of prompts and of responses (0: not compared).
    """

    alpha: float
    temperature: float
    states: float


def train_student(
    student: LanguageModel,
    teacher: LanguageModel,
    pairs: Sequence[Pair],
    foreseen: Foreseen,
    held_out: Sequence[Pair],
    weights: Weights,
    schedule: Schedule,
    learning_rate: float,
    context: Context,
) -> Training:
    """Train the student in place on `pairs`, of which `foreseen` says what the teacher makes of them.

    The teacher itself is asked for states alone, and only where they were not kept. The held-out loss is that
    of the labels alone. Resumes, and raises, as `train`.
    """
    sizes = sizes_of(pairs, schedule)
    rows_at_once = schedule.rows_on_each(context.place.processes)
    plan = batches(sizes, schedule, context.seed, context.place.processes)

    def trainer(arguments: TrainingArguments) -> Trainer:
        return _StudentTrainer(
            student=student,
            teacher=teacher,
            weights=weights,
            place=context.place,
            held_out_loss=lambda: mean_loss(student, held_out, rows_at_once),
            model=student.model,
            args=arguments,
            train_dataset=Dataset.from_dict({"batch": list(range(len(plan)))}),
            data_collator=lambda items: _lesson(
                student, pairs, foreseen, [draw % len(pairs) for draw in plan[items[0]["batch"]]]
            ),
        )

    return fit(trainer, TrainingArguments, plan, sizes, schedule, learning_rate, context)


class _StudentTrainer(HeldOutLoss):
    """The loss is the mean over all response tokens of the global batch."""

    loss_is_scaled_for_ga = True

    def __init__(
        self, *, student: LanguageModel, teacher: LanguageModel, weights: Weights, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._student, self._teacher, self._weights = student, teacher, weights

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        targets = SoftTargets(inputs["soft_ids"], inputs["soft_logprobs"])
        labels, batch = inputs["labels"], Batch(*(inputs[name] for name in BATCH))
        real = labels != IGNORED
        asked = model_inputs(self._student, batch)
        asked.pop("labels")
        alpha, temperature, of_states = self._weights
        outputs = model(**asked, output_hidden_states=bool(of_states))
        logits = outputs.logits[:, : labels.shape[1]][real]
        total = distillation_loss(logits, labels[real], targets, alpha, temperature)
        if of_states:
            wanted = self._wanted_states(inputs, batch)
            made = output_states(self._student, batch, outputs)
            apart = state_loss(made.prompt, wanted.prompt, batch.prompt_mask)
            apart = apart + state_loss(made.response, wanted.response, batch.response_mask)
            total = total + of_states * (apart * real.sum(dim=1)).sum()
        processes = self.accelerator.num_processes  # which average their gradients
        loss: Tensor = total * processes / num_items_in_batch
        return loss

    def _wanted_states(self, inputs: dict[str, Any], batch: Batch) -> States:
        if "prompt_states" in inputs:
            return States(inputs["prompt_states"], inputs["response_states"])
        with torch.no_grad():
            return hidden_states(self._teacher, batch)


def _lesson(
    student: LanguageModel, pairs: Sequence[Pair], foreseen: Foreseen, rows: Sequence[int]
) -> dict[str, Any]:
    """A batch, its labels, the teacher's soft targets, and its states where they were kept.

    `shift_labels` tells the Trainer that every label counts, the first one too.
    """
    batch = collate(student, *zip(*(pairs[row] for row in rows), strict=True))
    labels, targets = model_inputs(student, batch)["labels"], foreseen.of(rows)
    states = foreseen.states(rows, batch)
    return {
        **dict(zip(BATCH, batch, strict=False)),
        "labels": labels,
        "shift_labels": labels,
        "soft_ids": targets.ids,
        "soft_logprobs": targets.logprobs,
        **({} if states is None else {"prompt_states": states.prompt, "response_states": states.response}),
    }
