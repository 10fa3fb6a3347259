"""Quantisation-aware training: a model learns to say with rounded weights what it said with whole ones.

Its teacher is the model itself before any rounding, whose predictions it learns to repeat (as in LLM-QAT, Liu
et al. 2023, arXiv 2305.17888): nothing is learnt but to bear the error, whatever the model was trained for.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tasks.compress.formats import fake_quantization
from tasks.lm.collate import collate
from tasks.lm.model import LanguageModel
from tasks.lm.respond import IGNORED, model_inputs
from tasks.lm.schedule import Schedule
from tasks.lm.train import HeldOutLoss, Pair, Training, batches, fit, mean_loss, sizes_of
from tasks.stage import Context


def train_rounded(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    bits: int,
    group_size: int,
    schedule: Schedule,
    learning_rate: float,
    context: Context,
) -> Training:
    """Train `lm` in place, its linear layers rounded to `bits` in every pass, to predict `pairs` as now.

    The held-out loss is that of the responses of `held_out`. Resumes, and raises, as `tasks.lm.train.train`.
    """
    teacher = deepcopy(lm.model).eval().requires_grad_(False)
    sizes = sizes_of(pairs, schedule)
    rows_at_once = schedule.rows_on_each(context.place.processes)
    plan = batches(sizes, schedule, context.seed, context.place.processes)

    def trainer(arguments: TrainingArguments) -> Trainer:
        return _RoundedTrainer(
            teacher=teacher,
            place=context.place,
            held_out_loss=lambda: mean_loss(lm, held_out, rows_at_once),
            model=lm.model,
            args=arguments,
            train_dataset=_MicroBatches([[pairs[draw % len(pairs)] for draw in part] for part in plan]),
            data_collator=lambda items: _inputs(lm, items[0]),
        )

    with fake_quantization(lm.model, bits, group_size):
        return fit(trainer, TrainingArguments, plan, sizes, schedule, learning_rate, context)


def divergence(taught: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """Σ KL(teacher ‖ student) in nats over the tokens of `mask` `[B, T]`, from logits `[B, T, V]` of both."""
    each = F.kl_div(
        logits.float().log_softmax(dim=-1),
        taught.float().log_softmax(dim=-1),
        reduction="none",
        log_target=True,
    )
    return each.sum(dim=-1).masked_fill(~mask, 0).sum()


class _MicroBatches(Dataset[list[Pair]]):
    """Item i is the i-th micro-batch."""

    def __init__(self, batches: list[list[Pair]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[Pair]:
        return self._batches[index]


def _inputs(lm: LanguageModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Model inputs; `shift_labels` tells the Trainer that every label counts, the first one too."""
    prompts, responses = zip(*pairs, strict=True)
    inputs = model_inputs(lm, collate(lm, prompts, responses))
    return {**inputs, "shift_labels": inputs["labels"]}


class _RoundedTrainer(HeldOutLoss):
    """The loss is the mean divergence over all response tokens of the global batch."""

    loss_is_scaled_for_ga = True

    def __init__(self, *, teacher: torch.nn.Module, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._teacher = teacher

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        labels = inputs["shift_labels"]
        given = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        with torch.no_grad():
            taught = self._teacher(**given).logits[:, : labels.shape[1]]
        logits = model(**given).logits[:, : labels.shape[1]]
        total = divergence(taught, logits, labels != IGNORED)
        loss: Tensor = total * self.accelerator.num_processes / num_items_in_batch
        return loss
