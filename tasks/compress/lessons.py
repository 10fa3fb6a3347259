"""Prompts and answers to learn from: the references, or what a model itself answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tasks.data.records import Example
from tasks.lm.collate import encode_prompts, encode_responses
from tasks.lm.model import LanguageModel
from tasks.lm.respond import respond
from tasks.lm.train import Pair


class Limits(NamedTuple):
    """Tokens beyond which a prompt loses its middle and an answer its end, and how many prompts are answered at
    once."""

    prompt_tokens: int
    response_tokens: int
    batch_size: int


def references(lm: LanguageModel, examples: Sequence[Example], limits: Limits) -> list[Pair]:
    """Token ids of each example's prompt and first right answer."""
    return _pairs(lm, examples, [example.reference for example in examples], limits)


def own_answers(
    lm: LanguageModel,
    examples: Sequence[Example],
    limits: Limits,
    progress: Callable[[int], object] | None = None,
) -> list[Pair]:
    """Token ids of each example's prompt and of what the model answers to it.

    Learning these is sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947), here with greedy
    answers in place of those of a beam search. `progress` is told how many prompts each batch answered.
    """
    return _pairs(lm, examples, greedy_answers(lm, examples, limits, progress), limits)


def greedy_answers(
    lm: LanguageModel,
    examples: Sequence[Example],
    limits: Limits,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """An answer to the prompt of each example, one likeliest token after the other."""
    return respond(
        lm,
        [example.prompt for example in examples],
        {"do_sample": False, "num_beams": 1, "max_new_tokens": limits.response_tokens},
        batch_size=limits.batch_size,
        seed=0,  # nothing is drawn
        max_prompt_tokens=limits.prompt_tokens,
        progress=progress,
    )


def _pairs(
    lm: LanguageModel, examples: Sequence[Example], answers: Sequence[str], limits: Limits
) -> list[Pair]:
    prompts = encode_prompts(lm, [example.prompt for example in examples], limits.prompt_tokens)
    return list(zip(prompts, encode_responses(lm, answers, limits.response_tokens), strict=True))
