"""Train a language model of either family on prompts and responses, with transformers' Trainer.

Added to the Trainer: batches of similar length; a loss over response tokens only, the mean over all of them
in the global batch, so that accumulation changes nothing; checkpoints that are verified before they are
resumed; a stop on request that saves first. On a CPU an interrupted run ends with the bytes of an
uninterrupted one. In several processes each takes its part of every batch; the batches, and the loss, are those
of one.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from tasks.lm.collate import collate
from tasks.lm.device import device, precision
from tasks.lm.model import LanguageModel
from tasks.lm.respond import IGNORED, likelihoods, model_inputs
from tasks.lm.schedule import Schedule
from tasks.lm.sharded import in_parts, make_whole, shares_embeddings, shell_of
from tasks.stage import Context, ParamsError, checkpoints, memory
from tasks.stage.place import Place
from tasks.stage.progress import Bar

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its response
Sizes = NDArray[np.int64]  # [draws, 2], the tokens of prompt and response of every draw (epoch * rows + row)
Row = dict[str, float]
T = TypeVar("T")

LOSS_COLUMNS = ("step", "loss", "grad_norm", "learning_rate")
EVALUATION_COLUMNS = ("step", "eval_loss")
# Rows are sorted by length within so many batches, which keeps most of the shuffling: by their prompts, and,
# where responses are sorted too, by these in each strip.
BATCHES_PER_WINDOW = 64
BATCHES_PER_STRIP = 8


@dataclass(frozen=True)
class Training:
    """What a training run did; all but the last three is the same every time."""

    steps: int
    tokens: int  # prompt and response tokens trained on, padding left out
    losses: list[Row]  # LOSS_COLUMNS
    evaluations: list[Row]  # EVALUATION_COLUMNS
    seconds: float  # spent in steps; a resumed run counts from its resumption
    tokens_per_second: float
    peak_memory: int  # bytes: of the GPU, or of the process on a CPU


def train(
    lm: LanguageModel,
    rows: int,
    pair: Callable[[int], Pair],
    held_out: Sequence[Pair],
    schedule: Schedule,
    learning_rate: float,
    context: Context,
    *,
    sort_responses: bool = False,
) -> Training:
    """Train the parameters of `lm` that require gradients, in place.

    Row r of epoch e is `pair(e * rows + r)`; `sort_responses` as of `batches`. Resumes from the newest whole
    checkpoint in `context.work`. Raises ParamsError when the rows do not fill one batch, and Interrupted once a
    checkpoint was written on request.
    """
    sizes = _sizes(pair(draw) for draw in range(schedule.whole_epochs * rows))
    processes = context.place.processes
    rows_at_once = schedule.rows_on_each(processes)
    plan = batches(sizes, schedule, context.seed, processes, sort_responses=sort_responses)

    def trainer(arguments: TrainingArguments) -> Trainer:
        return _ResponseTrainer(
            place=context.place,
            held_out_loss=lambda: mean_loss(lm, held_out, rows_at_once),
            model=lm.model,
            args=arguments,
            train_dataset=_Plan(plan, pair),
            data_collator=lambda items: _trainer_inputs(lm, items[0]),
        )

    return fit(trainer, TrainingArguments, plan, sizes, schedule, learning_rate, context)


def fit(
    trainer_with: Callable[[Any], Trainer],
    arguments: type[TrainingArguments],
    plan: Sequence[Sequence[int]],
    sizes: Sizes,
    schedule: Schedule,
    learning_rate: float,
    context: Context,
) -> Training:
    """Train with the Trainer that `trainer_with` makes of its `arguments`; each of its items is a micro-batch.

    `plan` are the micro-batches, which `batches` made of the `sizes`. Resumes, and raises, as `train`.
    """
    disable_progress_bar()
    steps = len(plan) * schedule.rows_on_each(context.place.processes) // schedule.batch_size
    if steps == 0:
        raise ParamsError(
            f"{context.name}: {len(sizes) // schedule.whole_epochs} examples x {schedule.epochs} epochs do not "
            f"fill one batch "
            f"of {schedule.batch_size}; lower batch_size or raise epochs"
        )
    step_tokens = [int(sizes[step].sum()) for step in _steps_of(plan, steps)]
    start = checkpoints.newest_verified(context.work)
    trainer = trainer_with(_arguments(arguments, schedule, learning_rate, steps, context))
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled and shares_embeddings(trainer.model):
        kind = trainer.model.config.model_type
        raise ParamsError(
            f"compute.accelerate: {context.compute.accelerate} cannot part a {kind}, whose encoder and decoder "
            "share their embeddings; use ddp, zero2 or zero3"
        )
    shell = shell_of(trainer.model) if in_parts(trainer) else None
    with context.progress(steps, f"{context.name}: training") as bar:
        watch = _Watch(
            context=context,
            bar=bar,
            step_tokens=step_tokens,
            evaluate_at={
                round(steps * part / schedule.evaluations) for part in range(schedule.evaluations + 1)
            },
            evaluate=trainer.evaluate,
            stop_at_multiples_of=schedule.log_every,
        )
        trainer.add_callback(watch)
        with context.save_on_stop():
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    if shell is not None:
        make_whole(trainer.model, shell)
    trainer.model.eval()
    return Training(
        steps=steps,
        tokens=sum(step_tokens),
        losses=_rows(trainer.state.log_history, LOSS_COLUMNS),
        evaluations=_rows(trainer.state.log_history, EVALUATION_COLUMNS),
        seconds=watch.seconds,
        tokens_per_second=watch.tokens / watch.seconds if watch.seconds else 0.0,
        peak_memory=peak_memory(trainer.model.device),
    )


def sizes_of(pairs: Sequence[Pair], schedule: Schedule) -> Sizes:
    """The sizes of every draw where all epochs see the same pairs."""
    return np.tile(_sizes(pairs), (schedule.whole_epochs, 1))


def batches(
    sizes: Sizes, schedule: Schedule, seed: int, processes: int = 1, *, sort_responses: bool = False
) -> list[list[int]]:
    """Micro-batches of draws (epoch * rows + row), in the order they are trained on; `processes` take turns.

    Each epoch sees every row once, in a new order; rows with prompts of similar length share a batch. With
    `sort_responses` their responses are similar too, which saves padding where lengths vary much, but parts
    the tasks of a mixture from each other: batches of one task each teach less. What does not fill a last batch
    is left out. Micro-batches and processes change how a batch is cut, never what is in it.
    """
    generator = np.random.default_rng(seed)
    rows, size = len(sizes) // schedule.whole_epochs, schedule.batch_size
    epochs = [generator.permutation(rows) + epoch * rows for epoch in range(schedule.whole_epochs)]
    draws = np.concatenate(epochs)[: int(rows * schedule.epochs) // size * size]
    rows_at_once = schedule.rows_on_each(processes)
    planned: list[list[int]] = []
    for window in _cut(draws, size * BATCHES_PER_WINDOW):
        ordered = _longest_first(window, sizes[:, 0])
        if sort_responses:
            strips = _cut(ordered, size * BATCHES_PER_STRIP)
            ordered = np.concatenate([_longest_first(strip, sizes[:, 1]) for strip in strips])
        planned += generator.permutation(ordered.reshape(-1, size)).reshape(-1, rows_at_once).tolist()
    return planned


def _sizes(pairs: Iterable[Pair]) -> Sizes:
    return np.array([(len(prompt), len(response)) for prompt, response in pairs], dtype=np.int64).reshape(-1, 2)


def _cut(draws: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [draws[start : start + size] for start in range(0, len(draws), size)]


def _longest_first(draws: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    found: NDArray[np.int64] = draws[np.argsort(-lengths[draws], kind="stable")]
    return found


def mean_loss(lm: LanguageModel, pairs: Sequence[Pair], batch_size: int) -> float:
    """Mean negative log-likelihood (nats) of a response token."""
    was_training = lm.model.training
    lm.model.eval()
    prompts, responses = zip(*pairs, strict=True)
    found = likelihoods(lm, prompts, responses, batch_size=batch_size)
    lm.model.train(was_training)
    return sum(value.nll for value in found) / sum(value.tokens for value in found)


def forget_checkpoints(context: Context) -> None:
    """Remove the checkpoints of a run whose outputs are written: a forced rerun trains anew."""
    for folder in context.work.glob("checkpoint-*"):
        shutil.rmtree(folder)


def peak_memory(where: torch.device) -> int:
    """Most bytes that were in use at once: GPU memory on a GPU, else the memory of this process."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    return memory.peak_memory()


class _Plan(Dataset[list[Pair]]):
    """Item i is the i-th micro-batch."""

    def __init__(self, plan: list[list[int]], pair: Callable[[int], Pair]) -> None:
        self._plan = plan
        self._pair = pair

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> list[Pair]:
        return [self._pair(draw) for draw in self._plan[index]]


class HeldOutLoss(Trainer):  # type: ignore[misc]
    """A Trainer that evaluates by asking for one number, and in several processes lets the first alone write.

    Weights that are in parts on several processes are evaluated by all of them, so all are asked.
    """

    def __init__(self, *, place: Place, held_out_loss: Callable[[], float], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._place, self._held_out_loss = place, held_out_loss

    def compute_loss_context_manager(self) -> AbstractContextManager[None]:
        """Mixed precision also for a loss that calls parts of the model, not the model itself."""
        found: AbstractContextManager[None] = self.accelerator.autocast()
        return found

    def evaluate(self, *_: Any, **__: Any) -> Row:
        """The held-out loss."""
        with self.compute_loss_context_manager():
            found = {"eval_loss": self._held_out_loss()}
        self.log(found)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _save_rng_state(self, output_dir: str) -> None:
        """The first process writes the random states of all."""
        if self._place.processes == 1:
            super()._save_rng_state(output_dir)
            return
        with TemporaryDirectory() as own:
            super()._save_rng_state(own)
            states = {file.name: file.read_bytes() for file in Path(own).iterdir()}
        for each in self._place.gather(states):
            for name, state in each.items() if self._place.rank == 0 else ():
                (Path(output_dir) / name).write_bytes(state)


def through(model: torch.nn.Module, compute: Callable[[], T]) -> T:
    """`compute()`, which calls parts of `model`, as a call of `model` itself.

    What wraps a model for several processes is told of a pass by a call of it, and only then joins gradients.
    """
    inner = extract_model_from_parallel(model)
    own = vars(inner).get("forward")  # what mixed precision has put there

    def instead(*_: Any, **__: Any) -> T:
        if own is None:
            del inner.forward
        else:
            inner.forward = own
        return compute()

    inner.forward = instead
    return cast("T", model())


class _ResponseTrainer(HeldOutLoss):
    """The loss is the mean over all response tokens of the global batch, for either family."""

    loss_is_scaled_for_ga = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        labels = inputs["shift_labels"]
        arguments = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        logits = model(**arguments).logits[:, : labels.shape[1]].flatten(0, 1).float()
        total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        processes = self.accelerator.num_processes  # which average their gradients
        loss: Tensor = total * processes / num_items_in_batch
        return loss


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Shows progress, asks for the held-out loss, seals checkpoints, and stops on request."""

    def __init__(
        self,
        *,
        context: Context,
        bar: Bar,
        step_tokens: Sequence[int],
        evaluate_at: set[int],
        evaluate: Callable[[], Row],
        stop_at_multiples_of: int,
    ) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._context, self._bar, self._step_tokens = context, bar, step_tokens
        self._evaluate_at, self._evaluate = evaluate_at, evaluate
        self._stop_at_multiples_of = stop_at_multiples_of
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.resume(state.global_step)
        if state.global_step == 0:
            self._evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.tokens += self._step_tokens[state.global_step - 1]
        self._bar.advance()
        if state.global_step in self._evaluate_at:
            control.should_evaluate = True
        if state.global_step % self._stop_at_multiples_of == 0 and self._context.stopping:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Row, **_: Any) -> None:
        losses = {name: value for name, value in logs.items() if name in ("loss", "eval_loss")}
        self._bar.advance(0, **losses)
        self._context.track.metrics(losses, step=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._context.place.wait()  # for parts of weights that others write
        if self._context.place.rank == 0:
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _trainer_inputs(lm: LanguageModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Model inputs; `shift_labels` tells the Trainer that every label counts, the first one too."""
    prompts, responses = zip(*pairs, strict=True)
    inputs = model_inputs(lm, collate(lm, prompts, responses))
    return {**inputs, "shift_labels": inputs["labels"]}


def _arguments(
    arguments: type[TrainingArguments],
    schedule: Schedule,
    learning_rate: float,
    steps: int,
    context: Context,
) -> TrainingArguments:
    on_cpu = device(context.compute).type == "cpu"
    processes = context.place.processes
    return arguments(
        output_dir=str(context.work),
        seed=context.seed,
        num_train_epochs=1,  # the plan holds all of them
        per_device_train_batch_size=1,  # an item of the plan is a micro-batch
        gradient_accumulation_steps=schedule.batch_size // (schedule.rows_on_each(processes) * processes),
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(schedule.warmup * steps),
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.clip,
        optim="adamw_torch_fused",
        use_cpu=on_cpu,
        bf16=precision(context.compute) == torch.bfloat16,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        logging_steps=schedule.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=schedule.checkpoint_every,
        save_total_limit=2,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _steps_of(plan: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    """The draws of each optimizer step."""
    each = len(plan) // steps
    return [[draw for part in plan[at : at + each] for draw in part] for at in range(0, len(plan), each)]


def _rows(history: Sequence[Row], names: tuple[str, ...]) -> list[Row]:
    return [{name: row[name] for name in names} for row in history if set(names) <= set(row)]
