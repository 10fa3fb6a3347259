"""How fast a model answers, and how much memory its weights take."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tasks.lm.collate import collate
from tasks.lm.model import LanguageModel
from tasks.lm.respond import generate


class Speed(NamedTuple):
    """Of answering a batch of prompts greedily."""

    tokens_per_second: float  # of all answers, reading the prompts included
    first_token_seconds: float  # from the prompts to the first token of each answer


def speed(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], batch_size: int, new_tokens: int, repeats: int
) -> Speed:
    """Answer the first `batch_size` prompts (token ids) `repeats` times with `new_tokens` tokens each: medians.

    Fewer prompts than that are taken more than once. An untimed answer goes first.
    """
    batch = collate(lm, [prompts[row % len(prompts)] for row in range(batch_size)], [[]] * batch_size)

    def seconds(tokens: int) -> float:
        generation = {"do_sample": False, "num_beams": 1, "max_new_tokens": tokens, "min_new_tokens": tokens}
        start = time.perf_counter()
        generate(lm, batch.prompt_ids, batch.prompt_mask, generation)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        return time.perf_counter() - start

    seconds(new_tokens)
    whole = statistics.median(seconds(new_tokens) for _ in range(repeats))
    return Speed(
        tokens_per_second=batch_size * new_tokens / whole,
        first_token_seconds=statistics.median(seconds(1) for _ in range(repeats)),
    )


def weights_memory(lm: LanguageModel) -> int:
    """Bytes that parameters and buffers take in memory, tied ones once."""
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
