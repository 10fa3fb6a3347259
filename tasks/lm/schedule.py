"""The settings of one training run, shared by the stages that train on prompts and responses."""

import math
from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from tasks.stage import ParamsError, Section


class Schedule(Section):
    """How long to learn, in which batches, and what to record.

    `epochs` may be a fraction. An optimizer step sees `batch_size` examples, `micro_batch_size` of them
    (null: all) in one forward pass; several processes share them out. The learning rate rises from 0 over the
    share `warmup` of the steps, then falls linearly to 0; gradients are clipped to the norm `clip`. The
    held-out loss is taken before the first step and then `evaluations` times, the training loss every
    `log_every` steps; a checkpoint is written every `checkpoint_every` steps, a multiple of `log_every` so that
    no logged mean spans an interruption.
    """

    epochs: PositiveFloat
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    warmup: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegativeFloat
    clip: PositiveFloat
    evaluations: PositiveInt
    log_every: PositiveInt
    checkpoint_every: PositiveInt

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.batch_size % self.rows_at_once:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} is not a multiple of log_every {self.log_every}"
            )
        return self

    @property
    def whole_epochs(self) -> int:
        """Epochs that are begun."""
        return math.ceil(self.epochs)

    @property
    def rows_at_once(self) -> int:
        """Examples in one forward pass of a process that is alone."""
        return self.micro_batch_size or self.batch_size

    def rows_on_each(self, processes: int) -> int:
        """Examples in one forward pass of each of so many processes.

        Raises ParamsError when a batch cannot be shared out evenly.
        """
        if self.batch_size % ((self.micro_batch_size or 1) * processes):
            raise ParamsError(
                f"batch_size {self.batch_size} cannot be shared evenly by compute.processes, {processes}"
                + (f", in parts of micro_batch_size, {self.micro_batch_size}" if self.micro_batch_size else "")
            )
        return self.micro_batch_size or self.batch_size // processes
