"""Prompts in, responses out: the one module that knows a seq2seq model from a causal one.

Everything is response-aligned: whatever the family, position t of a `[B, T]` tensor is the t-th token of the
response. A seq2seq model reads the prompt in its encoder, padded on the right. A causal model reads prompt and
response as one sequence, the prompt padded on the left and positions counted from the mask, so that all
responses of a batch start in the same column. Masks are made from lengths, never from ids, so the padding token
may be any token. Padding changes nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.lm.model import LanguageModel

IGNORED = -100  # a label that counts in no loss
# Ends the prompt of a causal model whose tokenizer has no chat template; the response follows.
PROMPT_END = "\n"


class Batch(NamedTuple):
    """Token ids of B prompts (P tokens, padded) and their responses (T tokens, padded on the right)."""

    prompt_ids: Tensor  # [B, P] int64
    prompt_mask: Tensor  # [B, P] int64, 1 on real tokens
    response_ids: Tensor  # [B, T] int64
    response_mask: Tensor  # [B, T] int64

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(tensor.to(device) for tensor in self))


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


def model_inputs(lm: LanguageModel, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a forward pass over prompt and response, with `labels` `[B, T]` beside them.

    The labels are response-aligned for both families (-100 off the response), as are the first T logits of the
    pass: `model(**inputs).logits[:, :T]`. A causal model computes logits at the T + 1 last positions alone.
    """
    labels = batch.response_ids.masked_fill(batch.response_mask == 0, IGNORED)
    if lm.is_encoder_decoder:
        start = lm.model.config.decoder_start_token_id
        return {
            "input_ids": batch.prompt_ids,
            "attention_mask": batch.prompt_mask,
            "decoder_input_ids": F.pad(batch.response_ids[:, :-1], (1, 0), value=start),
            "labels": labels,
        }
    mask = torch.cat((batch.prompt_mask, batch.response_mask), dim=1)
    return {
        "input_ids": torch.cat((batch.prompt_ids, batch.response_ids), dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "logits_to_keep": batch.response_ids.shape[1] + 1,
        "labels": labels,
    }


def response_logits(lm: LanguageModel, batch: Batch) -> Tensor:
    """Logits `[B, T, V]` (float32) that predict each response token from all that stands before it."""
    inputs = model_inputs(lm, batch.to(lm.device))
    labels = inputs.pop("labels")
    logits: Tensor = lm.model(**inputs).logits[:, : labels.shape[1]]
    return logits.float()


def response_logprobs(lm: LanguageModel, batch: Batch) -> Tensor:
    """Log-probabilities `[B, T]` of the response tokens given the prompt; 0 on padding."""
    batch = batch.to(lm.device)
    losses = F.cross_entropy(response_logits(lm, batch).transpose(1, 2), batch.response_ids, reduction="none")
    return -losses * batch.response_mask


def generate(
    lm: LanguageModel, prompt_ids: Tensor, prompt_mask: Tensor, generation: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Generate from padded prompts `[B, P]`: response ids and mask, `[B, T]` each.

    `generation` holds `transformers.GenerationConfig` fields. The mask is 1 up to and with the first end token.
    """
    from transformers import GenerationConfig

    with torch.inference_mode():
        ids = lm.model.generate(
            input_ids=prompt_ids.to(lm.device),
            attention_mask=prompt_mask.to(lm.device),
            generation_config=GenerationConfig(**generation),
        )
    ids = ids[:, 1:] if lm.is_encoder_decoder else ids[:, prompt_ids.shape[1] :]
    ends = torch.isin(ids, torch.tensor(lm.model.generation_config.eos_token_id, device=ids.device)).long()
    return ids, (ends.cumsum(dim=1) - ends == 0).long()


def respond(
    lm: LanguageModel,
    prompts: Sequence[str],
    generation: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
    max_prompt_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Answer every prompt, in the order given.

    Prompts are answered in batches of similar length, longest first, so that what does not fit in memory fails
    at once. Sampling depends on `seed` and on the batches, and leaves the caller's random state alone.
    `progress` is told how many prompts each batch answered.
    """
    encoded = encode_prompts(lm, prompts, max_prompt_tokens)
    answers = [""] * len(prompts)
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for rows in batches_by_length([len(ids) for ids in encoded], batch_size):
            batch = collate(lm, [encoded[row] for row in rows], [[] for _ in rows])
            ids, mask = generate(lm, batch.prompt_ids, batch.prompt_mask, generation)
            kept = [row_ids[row_mask == 1] for row_ids, row_mask in zip(ids, mask, strict=True)]
            for row, text in zip(rows, lm.tokenizer.batch_decode(kept, skip_special_tokens=True), strict=True):
                answers[row] = text.strip()
            if progress is not None:
                progress(len(rows))
    return answers


class Likelihood(NamedTuple):
    """How well a model predicts one response."""

    nll: float  # negative log-likelihood of the whole response, in nats
    tokens: int  # tokens in the response, its end token included


def likelihoods(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    batch_size: int,
    progress: Callable[[int], object] | None = None,
) -> list[Likelihood]:
    """The likelihood of each response (token ids) given its prompt (token ids), in the order given."""
    found: dict[int, Likelihood] = {}
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    for rows in batches_by_length(lengths, batch_size):
        batch = collate(lm, [prompts[row] for row in rows], [responses[row] for row in rows])
        with torch.inference_mode():
            sums = response_logprobs(lm, batch).double().sum(dim=1).tolist()
        found |= {row: Likelihood(-total, len(responses[row])) for row, total in zip(rows, sums, strict=True)}
        if progress is not None:
            progress(len(rows))
    return [found[row] for row in range(len(prompts))]


def perplexity(
    lm: LanguageModel,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    batch_size: int,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> float:
    """Perplexity of the responses given their prompts, over all response tokens of the corpus."""
    return corpus_perplexity(
        likelihoods(
            lm,
            encode_prompts(lm, prompts, max_prompt_tokens),
            encode_responses(lm, responses, max_response_tokens),
            batch_size=batch_size,
            progress=progress,
        )
    )


def corpus_perplexity(values: Sequence[Likelihood]) -> float:
    """exp(Σ nll / Σ tokens): every token counts once, however long its response."""
    return math.exp(sum(value.nll for value in values) / sum(value.tokens for value in values))


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
