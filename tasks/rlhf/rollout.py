"""Rollouts: the policy's own answers to a batch of prompts, with all that an update needs to know of them.

Each prompt is read once and each token sampled once. The log-probabilities and values are those of the sampling
pass itself; the reference and the reward then read the finished answers. What an encoder that is not trained
made of a prompt is kept: the reference and every update start from there. A decoder reads a prompt once for all
answers to it that stand in one batch. Prompts are answered together with others of similar length. An engine
that samples in the policy's place computes a little differently: the policy reads the answers once more, and
its own log-probabilities count.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasks.data.records import Example
from tasks.lm.collate import Batch, batches_by_length, collate, collate_answers
from tasks.lm.engine import Engine
from tasks.lm.model import LanguageModel
from tasks.lm.respond import read_prompts, response_hidden, sample
from tasks.rlhf.policy import Policy, reads_once
from tasks.stage.place import Place


class Scores(NamedTuple):
    """The reward of N answers, and what each of its parts contributed."""

    total: list[float]
    parts: Mapping[str, list[float]]


class Reward(Protocol):
    """What answers are worth; `total` is the (weighted) sum of `parts`."""

    def __call__(self, examples: Sequence[Example], answers: Sequence[str]) -> Scores:
        """Return the scores of one answer to each example."""


class Responses(NamedTuple):
    """N sampled responses, in the order of their prompts; padded on the right."""

    response_ids: Tensor  # [N, T]
    mask: Tensor  # [N, T], 1 on real tokens, the end token among them
    logprobs: Tensor  # [N, T], 0 on padding
    values: Tensor  # [N, T], 0 on padding; of no use where the critic has a trunk of its own
    ended: Tensor  # [N] bool, whether the response closes with the end token
    answers: list[str]
    prompt_states: list[Tensor] | None  # of `read_once`, by the policy
    engine_logprobs: Tensor | None = None  # [N, T], what the engine that sampled thought of them


class Rollout(NamedTuple):
    """N episodes."""

    prompts: Sequence[Sequence[int]]  # token ids
    responses: Responses
    ref_logprobs: Tensor  # [N, T], 0 on padding
    scores: Scores
    critic_states: list[Tensor] | None  # of `read_once`, by the critic

    @property
    def mask(self) -> Tensor:
        """1 on the real tokens of the responses, `[N, T]`."""
        return self.responses.mask


def respond_by_sampling(
    policy: Policy, prompts: Sequence[Sequence[int]], uniforms: Tensor, batch_size: int
) -> Responses:
    """Sample one response to each of N prompts (token ids) from `uniforms` `[N, T]`.

    A response depends on its own prompt and uniforms alone, not on the batch it was sampled in.
    """
    if policy.engine is not None:
        return _sampled_by(policy.engine, policy, prompts, uniforms, batch_size)
    rows_of, found = [], []
    states = read_once(policy.lm, prompts, batch_size)
    with torch.no_grad():
        for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
            batch = collate_answers(policy.lm, [prompts[row] for row in rows], [[] for _ in rows])
            asked = (batch.prompt_ids, batch.prompt_mask)
            read = (padded(states, rows), batch.prompt_of)
            drawn = sample(policy.lm, *asked, uniforms[rows], policy.temperature, *read)
            values = policy.values(drawn.hidden) * drawn.response_mask
            rows_of.append(torch.tensor(rows))
            found.append((drawn.response_ids, drawn.response_mask, drawn.logprobs, values))
    order = torch.cat(rows_of).argsort()
    ids, mask, logprobs, values = (
        _stacked([part[field] for part in found])[order] for field in range(len(found[0]))
    )
    return Responses(ids, mask, logprobs, values, *_ended(policy.lm, ids, mask), states)


def _sampled_by(
    engine: Engine, policy: Policy, prompts: Sequence[Sequence[int]], uniforms: Tensor, batch_size: int
) -> Responses:
    """The responses of an engine to N prompts, with what the policy itself thinks of them."""
    engine.take(policy.lm)
    seeds = (uniforms[:, 0].double() * 2**31).long().tolist()
    sampling = {"temperature": policy.temperature, "max_tokens": uniforms.shape[1]}
    drawn = engine.answers(prompts, seeds, sampling)
    ids = pad_sequence([torch.tensor(answer) for answer in drawn.ids], batch_first=True)
    theirs = pad_sequence([torch.tensor(answer) for answer in drawn.logprobs], batch_first=True)
    lengths = torch.tensor([len(answer) for answer in drawn.ids])
    mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
    responses = Responses(
        ids,
        mask,
        torch.zeros_like(theirs),
        torch.zeros_like(theirs),
        *_ended(policy.lm, ids, mask),
        None,
        theirs,
    )
    with torch.no_grad():
        for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
            batch, width = part(policy, prompts, responses, rows)
            own = policy.evaluate(batch)
            responses.logprobs[rows, :width] = own.logprobs.cpu() * mask[rows, :width]
            responses.values[rows, :width] = own.values.cpu() * mask[rows, :width]
    return responses


def _ended(lm: LanguageModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[str]]:
    """Whether each response `[N, T]` closes with an end token, and its text."""
    lengths = mask.sum(dim=1)
    last = ids.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
    ends = torch.tensor(lm.model.generation_config.eos_token_id)
    kept = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    texts = lm.tokenizer.batch_decode(kept, skip_special_tokens=True)
    return torch.isin(last, ends), [text.strip() for text in texts]


def collect(
    policy: Policy,
    reward: Reward,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    batch_size: int,
) -> Rollout:
    """Answer N prompts (the examples' own, as token ids), and have the answers scored."""
    responses = respond_by_sampling(policy, prompts, uniforms, batch_size)
    ref_logprobs = torch.zeros_like(responses.logprobs)
    values = responses.values
    states = None if policy.critic is None else read_once(policy.critic, prompts, batch_size)
    for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        batch, width = part(policy, prompts, responses, rows)
        mask = responses.mask[rows, :width]
        ref_logprobs[rows, :width] = policy.reference_logprobs(batch).cpu() * mask
        if policy.critic is not None:
            batch = batch._replace(prompt_states=padded(states, rows))
            with torch.no_grad():
                values[rows, :width] = policy.values(response_hidden(policy.critic, batch)).cpu() * mask
    scores = reward(examples, responses.answers)
    return Rollout(prompts, responses, ref_logprobs, scores, states)


def joined(rollout: Rollout, prompts: Sequence[Sequence[int]], place: Place) -> Rollout:
    """The episodes of all processes, which answered their shares of `prompts`; this one's own in `rollout`.

    What an encoder made of a prompt stays with the process that has read it: elsewhere it is empty.
    """
    if place.processes == 1:
        return rollout
    own, share = rollout.responses, place.share(len(prompts))
    every = place.gather(own._replace(prompt_states=None))
    responses = Responses(
        response_ids=_stacked([each.response_ids for each in every]),
        mask=_stacked([each.mask for each in every]),
        logprobs=_stacked([each.logprobs for each in every]),
        values=_stacked([each.values for each in every]),
        ended=torch.cat([each.ended for each in every]),
        answers=[answer for each in every for answer in each.answers],
        prompt_states=_at(share, len(prompts), own.prompt_states),
    )
    scores = Scores(
        place.together(rollout.scores.total),
        {name: place.together(values) for name, values in rollout.scores.parts.items()},
    )
    references = _stacked(place.gather(rollout.ref_logprobs))
    return Rollout(prompts, responses, references, scores, _at(share, len(prompts), rollout.critic_states))


def _at(rows: range, count: int, states: list[Tensor] | None) -> list[Tensor] | None:
    """A list of `count` tensors, `states` at `rows` and empty ones elsewhere; None of None."""
    if states is None:
        return None
    return [torch.empty(0)] * rows.start + states + [torch.empty(0)] * (count - rows.stop)


@torch.no_grad()
def read_once(lm: LanguageModel, prompts: Sequence[Sequence[int]], batch_size: int) -> list[Tensor] | None:
    """What an encoder that is not trained makes of each prompt, `[P, D]` on the model's device.

    Equal prompts are read once. None: the encoder is trained, or there is none.
    """
    if not reads_once(lm):
        return None
    unique = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    states: dict[tuple[int, ...], Tensor] = {}
    for rows in batches_by_length([len(prompt) for prompt in unique], batch_size):
        batch = collate(lm, [unique[row] for row in rows], [[] for _ in rows])
        read = read_prompts(lm, batch.prompt_ids, batch.prompt_mask)
        states |= {unique[row]: read[at, : len(unique[row])] for at, row in enumerate(rows)}
    return [states[tuple(prompt)] for prompt in prompts]


def part(
    policy: Policy, prompts: Sequence[Sequence[int]], responses: Responses, rows: Sequence[int]
) -> tuple[Batch, int]:
    """The episodes at `rows` as a batch with no more padding than they need, and how many tokens wide."""
    lengths = responses.mask[rows].sum(dim=1).tolist()
    ids = [responses.response_ids[row, :length].tolist() for row, length in zip(rows, lengths, strict=True)]
    batch = collate_answers(policy.lm, [prompts[row] for row in rows], ids)
    return batch._replace(prompt_states=padded(responses.prompt_states, rows)), max(lengths)


def padded(states: Sequence[Tensor] | None, rows: Sequence[int]) -> Tensor | None:
    """The encoder's states `[B, P, D]` of the prompts at `rows`; None of None."""
    return None if states is None else pad_sequence([states[row] for row in rows], batch_first=True)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors `[b, t]` under one another, on the CPU, the narrower ones padded with 0."""
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor.cpu(), (0, width - tensor.shape[1])) for tensor in tensors])
