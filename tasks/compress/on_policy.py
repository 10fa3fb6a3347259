"""Train a causal student on its own answers, judged by its teacher, with TRL's GKDTrainer.

Generalised knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649): in a share of the batches the
student writes the answers itself, so that it learns what to do after its own mistakes. The loss is a divergence
of both distributions at temperature 1; labels only tell which tokens count. Added are the batches, the held-out
loss and the checkpoints of tasks/lm/train.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read when the module is imported
from trl.experimental.gkd import GKDConfig, GKDTrainer

from tasks.lm.collate import collate
from tasks.lm.model import LanguageModel
from tasks.lm.respond import IGNORED
from tasks.lm.schedule import Schedule
from tasks.lm.train import HeldOutLoss, Pair, Training, batches, fit, mean_loss, sizes_of
from tasks.stage import Context, ParamsError


def train_on_policy(
    student: LanguageModel,
    teacher: LanguageModel,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    options: dict[str, float],
    max_response_tokens: int,
    schedule: Schedule,
    learning_rate: float,
    context: Context,
) -> Training:
    """Train the student in place on `pairs`, or on answers of its own to their prompts.

    `options`: `share` of the batches with own answers, drawn at `temperature`; `beta`, from 0 (KL of teacher to
    student) to 1 (of student to teacher). Resumes, and raises, as `train`; ParamsError for a model with an
    encoder, which GKDTrainer cannot train.
    """
    if student.is_encoder_decoder:
        raise ParamsError(
            f"distill.method: on_policy is for causal models, and {student.model.config.model_type} has an "
            "encoder; set it to soft"
        )
    sizes = sizes_of(pairs, schedule)
    rows_at_once = schedule.rows_on_each(context.place.processes)
    plan = batches(sizes, schedule, context.seed, context.place.processes)
    arguments = partial(
        _Arguments,
        lmbda=options["share"],
        beta=options["beta"],
        temperature=options["temperature"],
        max_new_tokens=max_response_tokens,
    )

    def trainer(arguments: _Arguments) -> Trainer:
        return _OnPolicyTrainer(
            place=context.place,
            held_out_loss=lambda: mean_loss(student, held_out, rows_at_once),
            model=student.model,
            teacher_model=teacher.model,
            args=arguments,
            processing_class=student.tokenizer,
            train_dataset=Dataset.from_dict({"batch": list(range(len(plan)))}),
            data_collator=lambda items: _inputs(
                student, [pairs[draw % len(pairs)] for draw in plan[items[0]["batch"]]]
            ),
        )

    return fit(trainer, arguments, plan, sizes, schedule, learning_rate, context)  # type: ignore[arg-type]


@dataclass
class _Arguments(GKDConfig):  # type: ignore[misc]
    """TRL would compute activations twice to save memory, and asks for it under a name that is deprecated."""

    activation_checkpointing: bool | None = False


class _OnPolicyTrainer(HeldOutLoss, GKDTrainer):  # type: ignore[misc]
    def create_model_card(self, *_: Any, **__: Any) -> None:
        """A checkpoint needs none."""


def _inputs(student: LanguageModel, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """A batch as GKDTrainer wants it: labels along prompt and response, and the prompts by themselves."""
    batch = collate(student, *zip(*pairs, strict=True))
    labels = batch.response_ids.masked_fill(batch.response_mask == 0, IGNORED)
    return {
        "input_ids": torch.cat((batch.prompt_ids, batch.response_ids), dim=1),
        "attention_mask": torch.cat((batch.prompt_mask, batch.response_mask), dim=1),
        "labels": torch.cat((torch.full_like(batch.prompt_ids, IGNORED), labels), dim=1),
        "prompts": batch.prompt_ids,
        "prompt_attention_mask": batch.prompt_mask,
    }
