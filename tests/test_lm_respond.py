"""Prompts in, responses out: the same for both families, whatever the padding and the batches."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_toys import COMPUTE, FAMILIES, GREEDY, texts, toy

from tasks.lm.collate import (
    PROMPT_END,
    Batch,
    batches_by_length,
    collate,
    collate_answers,
    continuation,
    cut_middle,
    encode_prompts,
    encode_responses,
)
from tasks.lm.model import LanguageModel
from tasks.lm.respond import (
    IGNORED,
    corpus_perplexity,
    generate,
    likelihoods,
    model_inputs,
    perplexity,
    respond,
    response_hidden,
    response_logits,
    response_logprobs,
    response_outputs,
    sample,
)

PROMPTS = [text[: 10 + 17 * number] for number, text in enumerate(texts(8))]
RESPONSES = [text[: 5 + 6 * number] for number, text in enumerate(texts(8, seed=6))]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return toy(request.param)


def encoded(lm: LanguageModel) -> tuple[list[list[int]], list[list[int]]]:
    return encode_prompts(lm, PROMPTS), encode_responses(lm, RESPONSES)


def test_attention_is_the_fused_one(lm: LanguageModel) -> None:
    assert lm.model.config._attn_implementation == "sdpa"


def test_padding_changes_no_log_probability(lm: LanguageModel) -> None:
    prompts, responses = encoded(lm)
    together = response_logprobs(lm, collate(lm, prompts, responses))
    assert together.shape == (8, max(map(len, responses)))
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone = response_logprobs(lm, collate(lm, [prompt], [response]))[0]
        torch.testing.assert_close(together[row, : len(response)], alone, atol=1e-5, rtol=0)
        assert together[row, len(response) :].abs().sum() == 0


@pytest.mark.parametrize("responses", [[[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16]], [[5]] * 5])
def test_a_causal_prompt_with_many_answers_is_read_once_and_nothing_changes(responses: list[list[int]]) -> None:
    """Neither what is computed nor its gradients."""
    lm = toy("llama")
    lm.model.double()
    short, long = [40, 41], [50, 51, 52, 53, 54]
    prompts = [short, long, short, long, long]
    together, apart = collate_answers(lm, prompts, responses), collate(lm, prompts, responses)
    assert together.prompt_of is not None
    assert (together.prompt_ids.shape, together.prompt_of.tolist()) == ((2, 5), [0, 1, 0, 1, 1])
    real, gradients = apart.response_mask.unsqueeze(-1), []
    for batch in (together, apart):
        lm.model.zero_grad()
        outputs = response_outputs(lm, batch)
        gradients.append((outputs.logits * real, outputs.hidden * real, response_hidden(lm, batch) * real))
        sum(part.pow(2).mean() for part in gradients[-1]).backward()  # type: ignore[union-attr]
        gradients[-1] += tuple(each.grad.clone() for each in lm.model.parameters())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    uniforms = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    drawn = [
        sample(lm, each.prompt_ids, each.prompt_mask, uniforms, 1.0, None, each.prompt_of)
        for each in (together, apart)
    ]
    assert torch.equal(drawn[0].response_ids, drawn[1].response_ids)
    for one, other in zip(*drawn, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_prompts_of_an_encoder_and_prompts_with_one_answer_each_stand_side_by_side() -> None:
    twice = [[40, 41], [40, 41]]
    assert collate_answers(toy("t5"), twice, [[5], [6]]).prompt_ids.shape == (2, 2)
    assert collate_answers(toy("llama"), [[40], [41, 42]], [[5], [6]]).prompt_of is None


def test_padding_changes_nothing_where_positions_are_learnt() -> None:
    """GPT-2 adds a vector to each place; Llama only turns one place against another."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = toy("llama").tokenizer
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, initializer_range=0.3, eos_token_id=1)
    torch.manual_seed(0)
    lm = LanguageModel(GPT2LMHeadModel(config).eval(), tokenizer)
    prompts, responses = encoded(lm)
    together = response_logprobs(lm, collate(lm, prompts, responses))
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone = response_logprobs(lm, collate(lm, [prompt], [response]))[0]
        torch.testing.assert_close(together[row, : len(response)], alone, atol=1e-5, rtol=1e-5)
    one, eight = (respond(lm, PROMPTS, GREEDY, batch_size=size, seed=0) for size in (1, 8))
    assert one == eight


def test_the_padding_token_may_be_any_token(lm: LanguageModel) -> None:
    batch = collate(lm, *encoded(lm))
    other = Batch(
        batch.prompt_ids.masked_fill(batch.prompt_mask == 0, 7),
        batch.prompt_mask,
        batch.response_ids.masked_fill(batch.response_mask == 0, 7),
        batch.response_mask,
    )
    expected = response_logprobs(lm, batch)
    torch.testing.assert_close(response_logprobs(lm, other), expected, atol=1e-5, rtol=0)


def test_log_probabilities_are_those_of_the_bare_model(lm: LanguageModel) -> None:
    """Against the loss that transformers computes itself, one example at a time."""
    for prompt, response in zip(*encoded(lm), strict=True):
        if lm.is_encoder_decoder:
            loss = lm.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([response])).loss
        else:
            labels = [IGNORED] * len(prompt) + response
            loss = lm.model(input_ids=torch.tensor([prompt + response]), labels=torch.tensor([labels])).loss
        ours = -response_logprobs(lm, collate(lm, [prompt], [response])).sum() / len(response)
        assert ours.item() == pytest.approx(loss.item(), abs=1e-5)


def test_labels_leave_the_padding_out(lm: LanguageModel) -> None:
    batch = collate(lm, *encoded(lm))
    labels = model_inputs(lm, batch)["labels"]
    assert torch.equal(labels != IGNORED, batch.response_mask == 1)
    assert torch.equal(labels[labels != IGNORED], batch.response_ids[batch.response_mask == 1])


def test_causal_logits_are_computed_for_the_response_alone() -> None:
    lm = toy("llama")
    batch = collate(lm, *encoded(lm))
    inputs = model_inputs(lm, batch)
    del inputs["labels"]
    assert lm.model(**inputs).logits.shape[1] == batch.response_ids.shape[1] + 1
    assert response_logits(lm, batch).shape[:2] == batch.response_ids.shape


def test_answers_do_not_depend_on_the_batches(lm: LanguageModel) -> None:
    told: list[int] = []
    together = respond(lm, PROMPTS, GREEDY, batch_size=8, seed=0, progress=told.append)
    assert together == respond(lm, PROMPTS, GREEDY, batch_size=1, seed=0)
    assert together == respond(lm, PROMPTS, GREEDY, batch_size=3, seed=0)
    assert sum(told) == 8
    assert len(set(together)) > 1


def test_greedy_answers_are_the_most_likely_tokens(lm: LanguageModel) -> None:
    """Generation (with its cache) and the teacher-forced pass are the same model."""
    prompts = collate(lm, encode_prompts(lm, PROMPTS), [[] for _ in PROMPTS])
    ids, mask = generate(lm, prompts.prompt_ids, prompts.prompt_mask, GREEDY)
    best = response_logits(lm, Batch(prompts.prompt_ids, prompts.prompt_mask, ids, mask)).argmax(dim=-1)
    assert torch.equal(best[mask == 1], ids[mask == 1])


def test_sampling_follows_the_seed_and_leaves_the_callers_random_state(lm: LanguageModel) -> None:
    sampling = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0}
    before = torch.random.get_rng_state()
    first = respond(lm, PROMPTS, sampling, batch_size=4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == respond(lm, PROMPTS, sampling, batch_size=4, seed=1)
    assert first != respond(lm, PROMPTS, sampling, batch_size=4, seed=2)


def test_the_mask_ends_with_the_first_end_token(lm: LanguageModel) -> None:
    prompts = collate(lm, encode_prompts(lm, PROMPTS), [[] for _ in PROMPTS])
    others = list(range(20, 400))
    sampling = {"max_new_tokens": 20, "do_sample": True, "temperature": 100.0, "suppress_tokens": others}
    torch.manual_seed(0)
    ids, mask = generate(lm, prompts.prompt_ids, prompts.prompt_mask, sampling)
    end = lm.tokenizer.eos_token_id
    for row_ids, row_mask in zip(ids.tolist(), mask.tolist(), strict=True):
        length = row_ids.index(end) + 1 if end in row_ids else len(row_ids)
        assert row_mask == [1] * length + [0] * (len(row_ids) - length)
    assert 0 < mask.sum() < mask.numel()


def test_perplexity_counts_every_token_of_the_corpus_once(lm: LanguageModel) -> None:
    prompts, responses = encoded(lm)
    values = likelihoods(lm, prompts, responses, batch_size=3)
    assert [value.tokens for value in values] == [len(response) for response in responses]
    logprobs = response_logprobs(lm, collate(lm, prompts, responses))
    expected = math.exp(-logprobs.double().sum().item() / sum(map(len, responses)))
    assert corpus_perplexity(values) == pytest.approx(expected, rel=1e-5)
    assert perplexity(lm, PROMPTS, RESPONSES, batch_size=8) == pytest.approx(expected, rel=1e-5)
    mean_of_means = math.exp(sum(value.nll / value.tokens for value in values) / len(values))
    assert corpus_perplexity(values) != pytest.approx(mean_of_means, rel=1e-4)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(lm: LanguageModel) -> None:
    uniform = toy("t5" if lm.is_encoder_decoder else "llama")
    with torch.no_grad():
        for parameter in uniform.model.parameters():
            parameter.zero_()
    assert perplexity(uniform, PROMPTS, RESPONSES, batch_size=8) == pytest.approx(400, rel=1e-4)


def test_a_response_is_closed_unless_it_is_cut(lm: LanguageModel) -> None:
    end = lm.tokenizer.eos_token_id
    whole = encode_responses(lm, RESPONSES)
    assert all(ids.count(end) == 1 and ids[-1] == end for ids in whole)
    assert all(end not in ids and len(ids) == 3 for ids in encode_responses(lm, RESPONSES[4:], max_tokens=3))
    assert [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in whole] == RESPONSES


def test_a_causal_prompt_ends_with_the_chat_template_or_a_line_end() -> None:
    lm = toy("llama")
    start = lm.tokenizer.bos_token_id
    plain = encode_prompts(lm, ["Who asks?"])[0]
    assert plain[0] == start
    assert lm.tokenizer.decode(plain[1:]) == f"Who asks?{PROMPT_END}"
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }} |{% endfor %}"
    lm.tokenizer.chat_template = template
    chat = encode_prompts(lm, ["Who asks?"])[0]
    assert chat.count(start) == 1
    assert lm.tokenizer.decode(chat[1:]) == "user: Who asks? |"


@given(st.lists(st.integers(), max_size=30), st.integers(min_value=1, max_value=30))
def test_a_long_prompt_loses_its_middle(ids: list[int], limit: int) -> None:
    cut = cut_middle(ids, limit)
    assert len(cut) == min(len(ids), limit)
    head = (len(cut) + 1) // 2
    assert cut[:head] == ids[:head]
    assert cut[head:] == ids[len(ids) - (len(cut) - head) :]
    assert cut_middle(ids, None) == ids


@given(st.lists(st.integers(min_value=1, max_value=9), max_size=40), st.integers(min_value=1, max_value=7))
def test_batches_hold_every_row_once_longest_first(lengths: Sequence[int], size: int) -> None:
    batches = batches_by_length(lengths, size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in batches[:-1])


def test_a_continuation_is_the_whole_text_in_two_parts(lm: LanguageModel) -> None:
    ids = lm.tokenizer(texts(1)[0], add_special_tokens=False)["input_ids"]
    prompt, response = continuation(lm, ids, 5)
    inner = [token for token in prompt + response if token not in lm.tokenizer.all_special_ids]
    assert inner == ids
    assert len([token for token in prompt if token in ids]) == 5
    assert response[-1] == lm.tokenizer.eos_token_id


def test_compute_names_a_device_that_is_there() -> None:
    from tasks.lm.device import device, precision

    assert device(COMPUTE).type == "cpu"
    assert precision(COMPUTE.model_copy(update={"precision": "auto"})) == torch.float32
    assert precision(COMPUTE.model_copy(update={"precision": "bf16"})) == torch.bfloat16
