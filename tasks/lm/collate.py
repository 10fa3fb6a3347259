"""Texts to token ids, and token ids to batches: what a model is given to read, for either family.

A seq2seq model reads the prompt in its encoder, padded on the right, and the response in its decoder. A causal
model reads both as one sequence, the prompt padded on the left, so that all responses of a batch start in the
same column. Masks are made from lengths, never from ids, so the padding token may be any token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.lm.model import LanguageModel

# Ends the prompt of a causal model whose tokenizer has no chat template; the response follows.
PROMPT_END = "\n"


class Batch(NamedTuple):
    """Token ids of Q prompts (P tokens, padded) and B responses to them (T tokens, padded on the right)."""

    prompt_ids: Tensor  # [Q, P] int64
    prompt_mask: Tensor  # [Q, P] int64, 1 on real tokens
    response_ids: Tensor  # [B, T] int64
    response_mask: Tensor  # [B, T] int64
    prompt_states: Tensor | None = None  # [B, P, D], what an encoder made of the prompts; None: not read yet
    prompt_of: Tensor | None = None  # [B], row of the prompt of each response; None: Q is B, one to each

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


def encode_prompts(lm: LanguageModel, prompts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
    """Token ids of each prompt, as the model expects to be spoken to.

    Causal: in the tokenizer's chat template where it has one, else followed by a line end. A prompt longer than
    `max_tokens` loses its middle (as in LongBench, arXiv 2308.14508 §4.1): instructions stand at either end.
    """
    templated = not lm.is_encoder_decoder and lm.tokenizer.chat_template is not None
    if templated:
        texts = [
            lm.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts
        ]
    else:
        texts = list(prompts) if lm.is_encoder_decoder else [prompt + PROMPT_END for prompt in prompts]
    encoded: list[list[int]] = lm.tokenizer(texts, add_special_tokens=not templated, verbose=False)["input_ids"]
    return [cut_middle(ids, max_tokens) for ids in encoded]


def encode_responses(
    lm: LanguageModel, responses: Sequence[str], max_tokens: int | None = None
) -> list[list[int]]:
    """Token ids of each response, closed by the end token; one over `max_tokens` is cut and left open."""
    special = lm.is_encoder_decoder
    encoded = lm.tokenizer(list(responses), add_special_tokens=special, verbose=False)["input_ids"]
    end = lm.tokenizer.eos_token_id
    return [(ids if ids[-1:] == [end] else [*ids, end])[:max_tokens] for ids in encoded]


def whole_text(lm: LanguageModel, ids: Sequence[int]) -> list[int]:
    """The token ids of a raw text as a causal model reads it: behind a start token, closed by the end token.

    Where a tokenizer has no start token its end token stands there, as between the documents it was trained on.
    """
    end = lm.tokenizer.eos_token_id
    start = end if lm.tokenizer.bos_token_id is None else lm.tokenizer.bos_token_id
    return [start, *ids, end]


def continuation(lm: LanguageModel, ids: Sequence[int], at: int) -> tuple[list[int], list[int]]:
    """A raw text as prompt (its first `at` tokens) and response (the others)."""
    return closed(lm, ids[:at], ids[at:])


def closed(lm: LanguageModel, prompt: Sequence[int], response: Sequence[int]) -> tuple[list[int], list[int]]:
    """The two parts of a raw text with the tokens that stand at the ends of each."""
    end = lm.tokenizer.eos_token_id
    if lm.is_encoder_decoder:
        return [*prompt, end], [*response, end]
    text = whole_text(lm, [*prompt, *response])
    return text[: len(prompt) + 1], text[len(prompt) + 1 :]


def cut_middle(ids: list[int], max_tokens: int | None) -> list[int]:
    """`ids`, or its first and last tokens when it is longer than `max_tokens`."""
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    head = (max_tokens + 1) // 2
    return ids[:head] + ids[len(ids) - (max_tokens - head) :]


def collate(lm: LanguageModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Pad token ids to a batch on the CPU: causal prompts on the left, all else on the right."""
    pad = lm.tokenizer.pad_token_id
    return Batch(*_pad(prompts, pad, left=not lm.is_encoder_decoder), *_pad(responses, pad, left=False))


def collate_answers(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Batch:
    """As `collate`, but a prompt that several responses answer is there once where the model is causal."""
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    if lm.is_encoder_decoder or len(rows) == len(prompts):
        return collate(lm, prompts, responses)
    pad = lm.tokenizer.pad_token_id
    prompt_of = torch.tensor([rows[tuple(prompt)] for prompt in prompts])
    return Batch(*_pad(list(rows), pad, left=True), *_pad(responses, pad, left=False), prompt_of=prompt_of)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first; rows of one length keep their order."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _pad(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask, `[B, longest row]`."""
    width = max(len(row) for row in rows)
    gaps = [width - len(row) for row in rows]
    sides = [(gap, 0) if left else (0, gap) for gap in gaps]
    ids = [[pad] * before + list(row) + [pad] * after for row, (before, after) in zip(rows, sides, strict=True)]
    mask = [
        [0] * before + [1] * len(row) + [0] * after for row, (before, after) in zip(rows, sides, strict=True)
    ]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)
