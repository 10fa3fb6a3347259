"""Sampling token by token: the same as a forward pass over the finished response, whatever is in the batch."""

import pytest
import torch
from lm_toys import FAMILIES, OPTIONS, shake, toy
from torch import Tensor

from tasks.data.synthetic import examples
from tasks.lm.collate import collate, encode_prompts
from tasks.lm.model import LanguageModel
from tasks.lm.peft import adapt
from tasks.lm.respond import Samples, entropy, response_logits, response_outputs, sample, token_logprobs

TOKENS = 10


@pytest.fixture(params=[(family, adapter) for family in FAMILIES for adapter in (False, True)], ids=str)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    family, adapter = request.param
    found = toy(family)
    if adapter:
        found = adapt(found, "lora", OPTIONS["lora"] | {"dropout": 0.0})
        shake(found)
        found.model.eval()
    # An end token that is likely, so that rows end at different places.
    end = found.tokenizer.eos_token_id
    head = found.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]).index_fill(0, torch.tensor(end), 6.0))
    head.bias.requires_grad = False
    return found


def prompts(lm: LanguageModel, count: int = 6) -> list[list[int]]:
    return encode_prompts(lm, [example.prompt for example in examples(1, count)][::3][:count], 90)


def draw(lm: LanguageModel, rows: list[list[int]], uniforms: Tensor, temperature: float = 1.0) -> Samples:
    batch = collate(lm, rows, [[] for _ in rows])
    return sample(lm, batch.prompt_ids, batch.prompt_mask, uniforms, temperature)


def uniforms(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, TOKENS, generator=torch.Generator().manual_seed(seed))


def test_a_response_does_not_depend_on_its_neighbours(lm: LanguageModel) -> None:
    rows, numbers = prompts(lm), uniforms(6)
    together = draw(lm, rows, numbers)
    lengths = together.response_mask.sum(dim=1)
    assert len(lengths.unique()) > 1  # they end at different places, so rows do leave the batch
    for row, prompt in enumerate(rows):
        alone = draw(lm, [prompt], numbers[row : row + 1])
        width = int(lengths[row])
        assert alone.response_ids.shape == (1, width)
        assert torch.equal(alone.response_ids[0], together.response_ids[row, :width])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row, :width], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.hidden[0], together.hidden[row, :width], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_kept_of_sampling_is_what_a_forward_pass_finds(lm: LanguageModel, temperature: float) -> None:
    rows = prompts(lm)
    drawn = draw(lm, rows, uniforms(6), temperature)
    lengths = drawn.response_mask.sum(dim=1).tolist()
    responses = [ids[:length].tolist() for ids, length in zip(drawn.response_ids, lengths, strict=True)]
    batch = collate(lm, rows, responses)
    assert torch.equal(batch.response_mask, drawn.response_mask)
    with torch.no_grad():
        logits, hidden = response_outputs(lm, batch)
    expected = token_logprobs(logits / temperature, batch.response_ids) * batch.response_mask
    torch.testing.assert_close(drawn.logprobs, expected, atol=1e-5, rtol=1e-5)
    kept = hidden * batch.response_mask.unsqueeze(-1)
    torch.testing.assert_close(drawn.hidden, kept, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, response_logits(lm, batch))


def test_a_response_ends_with_the_first_end_token(lm: LanguageModel) -> None:
    drawn = draw(lm, prompts(lm), uniforms(6))
    end = lm.tokenizer.eos_token_id
    for ids, mask in zip(drawn.response_ids, drawn.response_mask, strict=True):
        real = ids[mask == 1].tolist()
        assert end not in real[:-1]
        assert real[-1] == end or len(real) == TOKENS
        assert (ids[mask == 0] == lm.tokenizer.pad_token_id).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_come_as_often_as_the_model_says(lm: LanguageModel, temperature: float) -> None:
    prompt, count = prompts(lm)[0], 600
    grid = (torch.arange(count) + 0.5).unsqueeze(1) / count  # every quantile once: no noise
    first = draw(lm, [prompt] * count, grid, temperature).response_ids[:, 0]
    batch = collate(lm, [prompt], [[lm.tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = (response_logits(lm, batch)[0, 0] / temperature).softmax(dim=-1)
    found = torch.bincount(first, minlength=len(expected)) / count
    assert (found - expected).abs().max() <= 1.5 / count
    assert expected.max() < 0.99


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_give_possible_tokens(lm: LanguageModel, number: float) -> None:
    drawn = draw(lm, prompts(lm), torch.full((6, TOKENS), number))
    assert torch.isfinite(drawn.logprobs).all()
    assert (drawn.response_ids < lm.model.config.vocab_size).all()


def test_entropy_and_logprobs_are_those_of_the_distribution() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 4
    distribution = torch.distributions.Categorical(logits=logits)
    ids = torch.randint(7, (2, 3), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(entropy(logits), distribution.entropy())
    torch.testing.assert_close(token_logprobs(logits, ids), distribution.log_prob(ids))
