"""The shape of a model that is made from scratch."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tasks.stage import Section

BYTES = 256  # every byte is a token, so that no text is unknown


class Architecture(Section):
    """A T5-style (encoder and decoder of `layers` layers each) or Llama-style model with its tokenizer.

    `vocabulary` counts every token: bytes, learnt merges, special tokens and `added_tokens`, which are never
    cut. `positions` is the longest sequence a Llama is meant for; T5 has relative positions and no such
    limit.
    """

    family: Literal["t5", "llama"]
    d_model: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    d_ff: PositiveInt
    dropout: Annotated[float, Field(ge=0, lt=1)]
    positions: PositiveInt
    vocabulary: Annotated[int, Field(gt=BYTES)]
    added_tokens: list[str]

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        return self
