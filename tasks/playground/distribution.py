"""The probabilities of the next token, step by step: from what the model says to what an answer is drawn from.

Each step is the logits processor of transformers that `generate` runs for that setting, in the same order, so
that the last step is the distribution `generate` draws from.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tasks.playground.settings import Settings

RAW = "what the model says"


class Step(NamedTuple):
    """What is left of the model's scores after a setting has been applied."""

    name: str
    scores: Tensor  # [V], -inf for tokens that were cut

    @property
    def probabilities(self) -> Tensor:
        """`[V]`, 0 for tokens that were cut."""
        return self.scores.softmax(dim=-1)

    @property
    def kept(self) -> Tensor:
        """Which tokens are left: `[V]` bool."""
        return self.scores > -torch.inf

    @property
    def entropy(self) -> float:
        """How open the choice is, in nats."""
        return float(torch.special.entr(self.probabilities.double()).sum())


class Before(NamedTuple):
    """What stands before a token: ids that settings look back at, of which the last `new` are the answer's."""

    ids: Sequence[int]
    new: int


def steps(logits: Tensor, before: Before, settings: Settings, ids: GenerationConfig) -> list[Step]:
    """The distributions over V tokens: what the model says, and after each setting that is on.

    `logits` `[V]` are the model's, float32 on the CPU; `ids` holds its special tokens.
    """
    scores = logits.unsqueeze(0)
    if settings.strategy == "Beam search":  # whose settings are applied to log-probabilities
        scores = scores.log_softmax(dim=-1)
    seen = torch.tensor([list(before.ids)])
    found = [Step(RAW, scores[0])]
    for name, process in _processors(before, settings, ids):
        scores = process(seen, scores)
        found.append(Step(name, scores[0]))
    return found


def _processors(
    before: Before, settings: Settings, ids: GenerationConfig
) -> Iterator[tuple[str, LogitsProcessor]]:
    if settings.repetition_penalty != 1:
        penalty = settings.repetition_penalty
        yield f"repetition penalty {penalty:g}", RepetitionPenaltyLogitsProcessor(penalty)
    if size := settings.no_repeat_ngram_size:
        yield f"no {size} tokens twice", NoRepeatNGramLogitsProcessor(size)
    if before.new < settings.min_new_tokens:
        start = len(before.ids) - before.new
        yield (
            f"at least {settings.min_new_tokens} tokens",
            MinNewTokensLengthLogitsProcessor(start, settings.min_new_tokens, ids.eos_token_id),
        )
    if ids.forced_bos_token_id is not None and len(before.ids) == 1:
        yield "forced first token", ForcedBOSTokenLogitsProcessor(ids.forced_bos_token_id)
    if ids.forced_eos_token_id is not None and before.new == settings.max_new_tokens - 1:
        length = len(before.ids) + 1
        yield "forced last token", ForcedEOSTokenLogitsProcessor(length, ids.forced_eos_token_id)
    if not settings.samples:
        return
    if settings.temperature != 1:
        yield f"temperature {settings.temperature:g}", TemperatureLogitsWarper(settings.temperature)
    if settings.top_k:
        yield f"top-k {settings.top_k}", TopKLogitsWarper(settings.top_k)
    if settings.top_p < 1:
        yield f"top-p {settings.top_p:g}", TopPLogitsWarper(settings.top_p)
    if settings.min_p:
        yield f"min-p {settings.min_p:g}", MinPLogitsWarper(settings.min_p)


class Row(NamedTuple):
    """A token, with its probability after each step; None once it was cut."""

    token: int
    probabilities: list[float | None]
    chosen: bool


class Rest(NamedTuple):
    """All tokens that have no row."""

    tokens: int
    probabilities: list[float]


def rows(found: Sequence[Step], chosen: int, count: int) -> tuple[list[Row], Rest]:
    """The `count` likeliest tokens by what the model says, likeliest first, with `chosen` in any case."""
    order = found[0].scores.argsort(descending=True, stable=True)[:count].tolist()
    if chosen not in order:
        order.append(chosen)
    values = torch.stack([step.probabilities for step in found])[:, order].T.tolist()  # [rows, steps]
    kept = torch.stack([step.kept for step in found])[:, order].T.tolist()
    table = [
        Row(
            token,
            [value if left else None for value, left in zip(row, left_of_row, strict=True)],
            token == chosen,
        )
        for token, row, left_of_row in zip(order, values, kept, strict=True)
    ]
    rest = [max(0.0, 1.0 - sum(column)) for column in zip(*values, strict=True)]
    return table, Rest(len(found[0].scores) - len(order), rest)
