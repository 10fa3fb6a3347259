"""Train a student on labels and on what its teacher foresees, with the machinery of tasks/lm/train.py."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tasks.compress.distillation import SoftTargets, distillation_loss, state_loss
from tasks.compress.teacher import Foreseen
from tasks.lm.model import LanguageModel
from tasks.lm.respond import IGNORED, collate, model_inputs, read_prompts
from tasks.lm.schedule import Schedule
from tasks.lm.train import HeldOutLoss, Pair, Training, batches, fit, mean_loss, sizes_of
from tasks.stage import Context


class Weights(NamedTuple):
    """`alpha` of the soft targets, at `temperature`, beside the labels; and that of `states` (0: not compared).

    The states are those that an encoder makes of the prompt, or a causal model of the whole text.
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

    The teacher itself is asked for states alone, each time anew: kept, they would fill a disk. The held-out
    loss is that of the labels alone. Resumes, and raises, as `train`.
    """
    sizes = sizes_of(pairs, schedule)
    plan = batches(sizes, schedule, context.seed)

    def trainer(arguments: TrainingArguments) -> Trainer:
        return _StudentTrainer(
            teacher=teacher,
            weights=weights,
            held_out_loss=lambda: mean_loss(student, held_out, schedule.rows_at_once),
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

    def __init__(self, *, teacher: LanguageModel, weights: Weights, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._teacher, self._weights = teacher, weights

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
        alpha, temperature, of_states = self._weights
        outputs = model(**inputs, output_hidden_states=bool(of_states) and not self._teacher.is_encoder_decoder)
        logits = outputs.logits[:, : labels.shape[1]][real]
        total = distillation_loss(logits, labels[real], targets, alpha, temperature)
        if of_states:
            apart = state_loss(*self._states(inputs, outputs), inputs["attention_mask"])
            total = total + of_states * (apart * real.sum(dim=1)).sum()
        processes = self.accelerator.num_processes  # which average their gradients
        loss: Tensor = total * processes / num_items_in_batch
        return loss

    def _states(self, inputs: Mapping[str, Tensor], outputs: Any) -> tuple[Tensor, Tensor]:
        """The student's states and the teacher's: of an encoder's prompt, or of a causal model's whole text."""
        teacher = self._teacher
        with torch.no_grad():
            if teacher.is_encoder_decoder:
                read = read_prompts(teacher, inputs["input_ids"], inputs["attention_mask"])
                return outputs.encoder_last_hidden_state, read
            text = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
            return outputs.hidden_states[-1], teacher.model.get_decoder()(**text).last_hidden_state


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
