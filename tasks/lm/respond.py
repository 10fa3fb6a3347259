"""Prompts in, responses out: the one module that knows a seq2seq model from a causal one.

Everything is response-aligned: whatever the family, position t of a `[B, T]` tensor is the t-th token of the
response. Where a causal model reads prompt and response as one sequence (tasks/lm/collate.py), positions are
counted from the mask. Padding changes nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from tasks.lm.collate import Batch, batches_by_length, collate, encode_prompts, encode_responses
from tasks.lm.model import LanguageModel, bare

IGNORED = -100  # a label that counts in no loss


def read_prompts(lm: LanguageModel, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """What the encoder of a seq2seq model makes of the prompts, `[B, P, D]`."""
    read = lm.model.get_encoder()(input_ids=prompt_ids.to(lm.device), attention_mask=prompt_mask.to(lm.device))
    states: Tensor = read.last_hidden_state
    return states


def model_inputs(lm: LanguageModel, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a forward pass over prompt and response, with `labels` `[B, T]` beside them.

    The labels are response-aligned for both families (-100 off the response), as are the first T logits of the
    pass: `model(**inputs).logits[:, :T]`. A causal model computes logits at the T + 1 last positions alone.
    """
    labels = batch.response_ids.masked_fill(batch.response_mask == 0, IGNORED)
    if lm.is_encoder_decoder:
        start = lm.model.config.decoder_start_token_id
        return {
            **_prompt_inputs(batch),
            "attention_mask": batch.prompt_mask,
            "decoder_input_ids": F.pad(batch.response_ids[:, :-1], (1, 0), value=start),
            "labels": labels,
        }
    mask = torch.cat((batch.prompt_mask, batch.response_mask), dim=1)
    return {
        "input_ids": torch.cat((batch.prompt_ids, batch.response_ids), dim=1),
        "attention_mask": mask,
        "position_ids": _positions(mask),
        "logits_to_keep": batch.response_ids.shape[1] + 1,
        "labels": labels,
    }


def _prompt_inputs(batch: Batch) -> dict[str, Any]:
    if batch.prompt_states is None:
        return {"input_ids": batch.prompt_ids}
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=batch.prompt_states)}


class Outputs(NamedTuple):
    """What a model computes of given responses, position t from all that stands before the t-th token."""

    logits: Tensor  # [B, T, V] float32
    hidden: Tensor  # [B, T, D], what the language-model head reads


def response_outputs(lm: LanguageModel, batch: Batch) -> Outputs:
    """Logits that predict the response tokens, and the hidden states they are made of, in one forward pass; two
    where prompts are shared.
    """
    if batch.prompt_of is not None:
        batch = batch.to(lm.device)
        with _head_inputs(lm) as caught:
            passes = _behind_shared_prompts(batch, lm.model, logits_to_keep=1)
        logits = _aligned(batch, [each.logits for each in passes])
        return Outputs(logits.float(), _aligned(batch, caught))
    inputs = model_inputs(lm, batch.to(lm.device))
    width = inputs.pop("labels").shape[1]
    with _head_inputs(lm) as caught:
        logits = lm.model(**inputs).logits
    return Outputs(logits[:, :width].float(), caught[0][:, :width])


def _behind_shared_prompts(batch: Batch, read: Callable[..., Any], **of_prompts: Any) -> list[Any]:
    """What a causal model makes of each prompt, and of the responses, all but their last tokens, behind the
    keys and values of that. `of_prompts` is for the first pass alone.
    """
    prompts = read(
        input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask,
        position_ids=_positions(batch.prompt_mask), use_cache=True, **of_prompts,
    )  # fmt: skip
    if batch.response_ids.shape[1] == 1:
        return [prompts]
    cache = prompts.past_key_values
    cache.batch_select_indices(batch.prompt_of)
    mask = torch.cat((batch.prompt_mask[batch.prompt_of], batch.response_mask[:, :-1]), dim=1)
    responses = read(
        input_ids=batch.response_ids[:, :-1], attention_mask=mask,
        position_ids=_positions(mask)[:, batch.prompt_ids.shape[1] :], past_key_values=cache, use_cache=True,
    )  # fmt: skip
    return [prompts, responses]


def _aligned(batch: Batch, parts: Sequence[Tensor]) -> Tensor:
    """`[B, T, ·]` of both passes: what stands behind the last token of each prompt, and behind its response."""
    of_prompts, *of_responses = parts
    return torch.cat((of_prompts[:, -1:][batch.prompt_of], *of_responses), dim=1)


def _positions(mask: Tensor) -> Tensor:
    """Positions counted from the mask, so that padding on the left takes none."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


class States(NamedTuple):
    """The last hidden states: what is made of the prompt, and what each response token is predicted from."""

    prompt: Tensor  # [B, P, D], of a seq2seq model's encoder
    response: Tensor  # [B, T, D], position t before the t-th token


def hidden_states(lm: LanguageModel, batch: Batch) -> States:
    """The states of prompts and responses; no language-model head is run."""
    inputs = model_inputs(lm, batch.to(lm.device))
    inputs.pop("labels")
    model = bare(lm)
    if lm.is_encoder_decoder:
        mask, read = batch.prompt_mask.to(lm.device), batch.prompt_states
        prompt = read_prompts(lm, batch.prompt_ids, mask) if read is None else read.to(lm.device)
        found: Tensor = model.get_decoder()(
            input_ids=inputs["decoder_input_ids"],
            encoder_hidden_states=prompt,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        return States(prompt, found)
    inputs.pop("logits_to_keep")
    return _cut_states(model.get_decoder()(**inputs, use_cache=False).last_hidden_state, batch)


def response_hidden(lm: LanguageModel, batch: Batch) -> Tensor:
    """The last hidden states `[B, T, D]` before each response token; no language-model head is run."""
    if batch.prompt_of is None:
        return hidden_states(lm, batch).response
    batch = batch.to(lm.device)
    passes = _behind_shared_prompts(batch, bare(lm).get_decoder())
    return _aligned(batch, [each.last_hidden_state for each in passes])


def output_states(lm: LanguageModel, batch: Batch, outputs: Any) -> States:
    """The states in what `lm.model(**model_inputs(lm, batch), output_hidden_states=True)` gave."""
    if lm.is_encoder_decoder:
        return States(outputs.encoder_last_hidden_state, outputs.decoder_hidden_states[-1])
    return _cut_states(outputs.hidden_states[-1], batch)


def _cut_states(found: Tensor, batch: Batch) -> States:
    """The two parts of a causal model's states, `[B, P + T, D]`."""
    width = batch.prompt_ids.shape[1]
    return States(found[:, :width], found[:, width - 1 : -1])


def response_logits(lm: LanguageModel, batch: Batch) -> Tensor:
    """Logits `[B, T, V]` (float32) that predict each response token from all that stands before it."""
    if batch.prompt_of is not None:
        return response_outputs(lm, batch).logits
    inputs = model_inputs(lm, batch.to(lm.device))
    labels = inputs.pop("labels")
    logits: Tensor = lm.model(**inputs).logits[:, : labels.shape[1]]
    return logits.float()


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities `[B, T]` of the tokens `ids` `[B, T]` under `logits` `[B, T, V]`."""
    return -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


def entropy(logits: Tensor) -> Tensor:
    """Entropy `[B, T]` (nats) of the distributions given by `logits` `[B, T, V]`: log Z − E[logit]."""
    expected = (logits.softmax(dim=-1) * logits).sum(dim=-1)
    return logits.logsumexp(dim=-1) - expected


def response_logprobs(lm: LanguageModel, batch: Batch) -> Tensor:
    """Log-probabilities `[B, T]` of the response tokens given the prompt; 0 on padding."""
    batch = batch.to(lm.device)
    return token_logprobs(response_logits(lm, batch), batch.response_ids) * batch.response_mask


class Samples(NamedTuple):
    """One sampled response to each of B prompts, padded on the right to the longest, T tokens."""

    response_ids: Tensor  # [B, T]
    response_mask: Tensor  # [B, T], 1 up to and with the end token
    logprobs: Tensor  # [B, T], under the distribution that was sampled from; 0 on padding
    hidden: Tensor  # [B, T, D], what the language-model head read; 0 on padding


@torch.no_grad()
def sample(
    lm: LanguageModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    temperature: float,
    prompt_states: Tensor | None = None,
    prompt_of: Tensor | None = None,
) -> Samples:
    """Sample from the whole distribution softmax(logits / `temperature`), with a key-value cache.

    Token t of row b is where the cumulative distribution passes `uniforms[b, t]` (`[B, longest response]`,
    in [0, 1)): a response depends on its own prompt and numbers only, not on the rows beside it. A row that
    has ended leaves the batch and costs no more. `prompt_states` is what `read_prompts` gave, if it was asked.
    `prompt_of` `[B]` tells which of the prompts each row answers, where several answer one.
    """
    rows, longest = uniforms.shape
    prompt_ids, prompt_mask = prompt_ids.to(lm.device), prompt_mask.to(lm.device)
    uniforms = uniforms.to(lm.device, torch.float64)
    ends = torch.tensor(lm.model.generation_config.eos_token_id, device=lm.device)
    ids = torch.full((rows, longest), lm.tokenizer.pad_token_id, device=lm.device)
    mask = torch.zeros((rows, longest), dtype=torch.int64, device=lm.device)
    logprobs = torch.zeros((rows, longest), device=lm.device)
    decoder = _Decoder(lm, prompt_ids, prompt_mask, prompt_states, prompt_of)
    hidden = torch.zeros((rows, longest, decoder.width), device=lm.device)
    active = torch.arange(rows, device=lm.device)
    tokens = None
    for at in range(longest):
        logits, read = decoder.step(tokens)
        scaled = (logits.float() / temperature).log_softmax(dim=-1)
        tokens = _inverse_cdf(scaled, uniforms[active, at])
        ids[active, at], mask[active, at] = tokens, 1
        logprobs[active, at] = scaled.gather(1, tokens.unsqueeze(1)).squeeze(1)
        hidden[active, at] = read.float()
        going = ~torch.isin(tokens, ends)
        if not going.all():
            active, tokens = active[going], tokens[going]
            if not len(active):
                break
            decoder.keep(going.nonzero().squeeze(1))
    width = int(mask.sum(dim=1).max())
    return Samples(ids[:, :width], mask[:, :width], logprobs[:, :width], hidden[:, :width])


def _inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token `[B]` at which the cumulative probability of `logprobs` `[B, V]` exceeds `uniforms`
    `[B]`.
    """
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    # Scaled by the last sum, so that rounding can leave no gap above it.
    passed = cumulative > (uniforms * cumulative[:, -1]).unsqueeze(1)
    return passed.to(torch.uint8).argmax(dim=-1)


class _Decoder:
    """One token after another for a batch of prompts, of which rows can be dropped."""

    def __init__(
        self,
        lm: LanguageModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        prompt_states: Tensor | None,
        prompt_of: Tensor | None,
    ) -> None:
        self.width: int = lm.model.get_output_embeddings().weight.shape[1]
        self._lm, self._mask, self._prompt_ids = lm, prompt_mask, prompt_ids
        self._prompt_of = None if prompt_of is None else prompt_of.to(lm.device)
        self._cache: Any = None
        self._encoded: Any = None
        if lm.is_encoder_decoder:
            read = read_prompts(lm, prompt_ids, prompt_mask) if prompt_states is None else prompt_states
            self._encoded = BaseModelOutput(last_hidden_state=read)

    def step(self, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits `[b, V]` and hidden states `[b, D]` behind `tokens` `[b]` (None: behind the prompt)."""
        if self._lm.is_encoder_decoder:
            start = self._lm.model.config.decoder_start_token_id
            begin = self._mask.new_full((len(self._mask),), start)
            inputs = {
                "encoder_outputs": self._encoded,
                "attention_mask": self._mask,
                "decoder_input_ids": (begin if tokens is None else tokens).unsqueeze(1),
            }
        elif tokens is None:
            inputs = {
                "input_ids": self._prompt_ids,
                "attention_mask": self._mask,
                "position_ids": _positions(self._mask),
                "logits_to_keep": 1,
            }
        else:
            self._mask = F.pad(self._mask, (0, 1), value=1)
            inputs = {
                "input_ids": tokens.unsqueeze(1),
                "attention_mask": self._mask,
                "position_ids": self._mask.sum(dim=1, keepdim=True) - 1,
            }
        with _head_inputs(self._lm) as caught:
            found = self._lm.model(**inputs, past_key_values=self._cache, use_cache=True)
        self._cache = found.past_key_values
        logits, read = found.logits[:, -1], caught[0][:, -1]
        if tokens is None and self._prompt_of is not None:
            self.keep(self._prompt_of)
            return logits[self._prompt_of], read[self._prompt_of]
        return logits, read

    def keep(self, rows: Tensor) -> None:
        """Go on with `rows` of the batch, which may be there several times."""
        self._mask = self._mask[rows]
        self._cache.batch_select_indices(rows)
        if self._encoded is not None:
            self._encoded.last_hidden_state = self._encoded.last_hidden_state[rows]


@contextmanager
def _head_inputs(lm: LanguageModel) -> Iterator[list[Tensor]]:
    """Collect what the language-model head is given, for the time of the block."""
    caught: list[Tensor] = []
    hook = lm.model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: caught.append(inputs[0])
    )
    try:
        yield caught
    finally:
        hook.remove()


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
        with torch.no_grad():  # in inference mode weights that lie in parts could not be gathered again
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
