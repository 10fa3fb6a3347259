"""PPO's step: the same however it is cut up, resumed to the bit, and on its way to a known optimum."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lm_toys import FAMILIES
from ppo_toys import EXAMPLES, letters, new, prompts, rollout, trainer
from torch import Tensor

from tasks.data.records import Example
from tasks.lm.collate import collate, encode_responses
from tasks.lm.model import LanguageModel
from tasks.lm.respond import response_logits, response_logprobs
from tasks.rlhf.optimum import two_outcomes
from tasks.rlhf.policy import Policy, new_policy
from tasks.rlhf.rollout import Scores
from tasks.rlhf.trainer import Change, minibatches, report


def state_after(family: str, steps: int = 1, separate: bool = False, **changes: Any) -> dict[str, Tensor]:
    policy = new(family, separate=separate)
    ppo = trainer(policy, **changes)
    for number in range(steps):
        ppo.step(number, EXAMPLES, prompts(policy))
    return {name: each for name, each in ppo.state().items() if not name.startswith("adam.")}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_give_the_update_of_one_batch(family: str, separate: bool) -> None:
    """Gradients are compared: of a small difference where one is nearly 0 Adam makes a large one. In float64,
    where the order of a sum does not show.
    """
    gradients = []
    for size in (None, 3):
        policy = new(family, separate=separate)
        for lm in filter(None, (policy.lm, policy.critic)):
            lm.model.double()
        with torch.no_grad():
            policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        ppo = trainer(policy, micro_batch_size=size, epochs=1, minibatches=1, max_grad_norm=1e9)
        ppo.step(0, EXAMPLES, prompts(policy))
        gradients.append({name: each.grad for name, each in policy.parameters()})
    whole, cut = gradients
    norm = torch.cat([gradient.flatten() for gradient in whole.values()]).norm()
    assert norm > 0.01
    for name, gradient in whole.items():
        assert float((gradient - cut[name]).abs().max() / norm) < 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restored_run_goes_on_to_the_bit(family: str) -> None:
    whole, halved = new(family), new(family)
    one, other = trainer(whole), trainer(halved)
    for number in range(4):
        seen = one.step(number, EXAMPLES, prompts(whole))
    for number in range(2):
        other.step(number, EXAMPLES, prompts(halved))
    state, beta = {name: each.clone() for name, each in other.state().items()}, other.beta
    fresh = new(family)
    resumed = trainer(fresh)
    resumed.restore(state)
    resumed.beta = beta
    for number in range(2, 4):
        again = resumed.step(number, EXAMPLES, prompts(fresh))
    assert again == seen
    assert all(torch.equal(each, resumed.state()[name]) for name, each in one.state().items())


def test_what_is_restored_lies_where_adam_looks_for_it() -> None:
    """A checkpoint is read into the memory of the CPU; `meta` stands for a GPU."""
    policy, elsewhere = new("llama"), new("llama")
    ppo = trainer(policy)
    ppo.step(0, EXAMPLES, prompts(policy))
    elsewhere.lm.model.to("meta")
    elsewhere.value_head.to("meta")
    resumed = trainer(elsewhere)
    resumed.restore(ppo.state())
    state = resumed.state()
    assert set(state) == set(ppo.state())
    assert all(each.is_meta != name.startswith("adam.step.") for name, each in state.items())


def test_every_epoch_sees_every_episode_once() -> None:
    parts = list(minibatches(10, epochs=3, parts=4, generator=torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [3, 3, 3, 1] * 3
    epochs = [[row for part in parts[at : at + 4] for row in part] for at in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_prompts_keep_their_answers_together() -> None:
    parts = list(minibatches(12, 2, 3, torch.Generator().manual_seed(0), together=4))
    assert [len(part) for part in parts] == [4] * 6
    assert all(part == list(range(part[0], part[0] + 4)) and part[0] % 4 == 0 for part in parts)
    assert sorted(part[0] for part in parts[:3]) == [0, 4, 8]
    assert [len(part) for part in minibatches(12, 1, 2, torch.Generator(), together=4)] == [8, 4]


@pytest.mark.parametrize("separate", [False, True])
def test_a_decoder_reads_the_prompt_of_many_answers_once_in_each_pass(
    separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many prompt tokens as that takes, and the same update, in float64."""
    asked, read = [example for example in EXAMPLES[:2] for _ in range(4)], []

    def trained(shuffle: str) -> tuple[int, dict[str, Tensor]]:
        policy = new("llama", separate=separate)
        for lm in filter(None, (policy.lm, policy.critic)):
            lm.model.double()
            lm.model.get_decoder().register_forward_pre_hook(
                lambda _, __, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
            )
        read.clear()
        ppo = trainer(policy, answers=4, batch_size=8, epochs=1, minibatches=2, shuffle=shuffle)
        for number in range(2):
            ppo.step(number, asked, prompts(policy, asked))
        return sum(read), {name: each.detach().clone() for name, each in policy.parameters()}

    mixed, _ = trained("episodes")
    tokens, together = trained("prompts")
    monkeypatch.setattr("tasks.rlhf.rollout.collate_answers", collate)
    many_tokens, apart = trained("prompts")
    assert tokens < mixed < many_tokens
    assert tokens < many_tokens / 2.5
    for name, parameter in together.items():
        torch.testing.assert_close(parameter, apart[name], atol=1e-4, rtol=1e-4, msg=name)


def test_an_update_that_goes_too_far_ends_early() -> None:
    policy = new("t5")
    far = trainer(policy, learning_rate=0.05, stop_at_kl=1e-4, epochs=4)
    assert far.step(0, EXAMPLES, prompts(policy))["updates"] < 8
    policy = new("t5")
    assert trainer(policy, epochs=4).step(0, EXAMPLES, prompts(policy))["updates"] == 8


def test_the_learning_rates_fall_and_the_value_function_learns_first() -> None:
    ppo = trainer(new("t5"), steps=10, value_warmup=2, learning_rate=0.1, value_learning_rate=1.0)
    acting, valuing = zip(*map(ppo.learning_rates, range(10)), strict=True)
    assert acting == pytest.approx([0, 0] + [0.1 * (1 - number / 10) for number in range(2, 10)])
    assert valuing == pytest.approx([1 - number / 10 for number in range(10)])
    policy = new("t5")
    before = {name: each.detach().clone() for name, each in policy.parameters()}
    trainer(policy, value_warmup=1).step(0, EXAMPLES, prompts(policy))
    moved = {name for name, each in policy.parameters() if not torch.equal(each, before[name])}
    assert moved == {"value_head.weight", "value_head.bias"}


def test_beta_follows_its_target() -> None:
    policy = new("t5")
    ppo = trainer(policy, target=50.0, horizon=8)  # far more than there will be
    ppo.step(0, EXAMPLES, prompts(policy))
    assert ppo.beta == pytest.approx(0.1 * 0.8)


def test_a_step_tells_what_it_saw() -> None:
    policy = new("llama")
    seen = trainer(policy).step(0, EXAMPLES, prompts(policy))
    first = rollout(policy)
    assert set(seen) >= {
        "reward", "reward_letters", "kl", "kl_k3", "entropy", "clip_fraction", "value_clip_fraction",
        "explained_variance", "response_tokens", "distinct_2", "ended", "beta", "update_kl",
    }  # fmt: skip
    assert 0 < seen["response_tokens"] <= 8
    assert seen["reward"] == pytest.approx(seen["reward_letters"])
    assert seen["entropy"] > 0
    assert abs(seen["kl"]) < 1e-3
    assert sum(letters(EXAMPLES, first.responses.answers).total) >= 0
    assert "engine_kl" not in seen


def test_how_far_an_engine_is_from_the_policy_is_told_in_nats_a_response() -> None:
    found = rollout(new("llama"))
    responses = found.responses._replace(engine_logprobs=found.responses.logprobs + 0.25)
    seen = report(
        found._replace(responses=responses), torch.zeros_like(found.ref_logprobs), [Change(*[0.0] * 6)]
    )
    assert seen["engine_kl"] == pytest.approx(0.25 * seen["response_tokens"], rel=1e-5)


# A model that says "a" or "b", then ends: answers of two tokens, all of which can be tried.
BETA = 0.2
ONE = EXAMPLES[:1]


def says_b(_: Sequence[Example], answers: Sequence[str]) -> Scores:
    found = [float(answer == "b") for answer in answers]
    return Scores(found, {"b": found})


def says_a_or_b(family: str) -> Policy:
    policy = new(family, "full")
    lm = policy.lm
    prompt = prompts(policy, ONE)[0]
    responses = encode_responses(lm, ["a", "b"])
    assert [len(response) for response in responses] == [2, 2]
    batch = collate(lm, [prompt] * 2, responses)
    optimizer = torch.optim.Adam(lm.model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (-response_logprobs(lm, batch).sum()).backward()
        optimizer.step()
    return new_policy(lm, "full", {}, temperature=1.0)


def all_answers(policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of every answer under the policy and the reference, and the rewards; each `[V * V]`."""
    size, end = len(policy.lm.tokenizer), policy.lm.tokenizer.eos_token_id
    batch = collate(policy.lm, prompts(policy, ONE) * size, [[first, 0] for first in range(size)])

    def chances(lm: LanguageModel) -> Tensor:
        with torch.no_grad():
            both = response_logits(lm, batch).log_softmax(-1)
        first, second = both[0, 0], both[:, 1].clone()
        second[end] = -math.inf  # an answer that has ended has no second token
        second[end, 0] = 0.0
        return (first[:, None] + second).flatten()

    ours = chances(policy.lm)
    with policy.reference_model() as reference:
        theirs = chances(reference)
    b = policy.lm.tokenizer.encode("b", add_special_tokens=False)[0]
    rewards = torch.zeros(size, size)
    rewards[b, end] = 1.0
    return ours, theirs, rewards.flatten()


def objective(ours: Tensor, theirs: Tensor, rewards: Tensor) -> float:
    possible = ours > -math.inf
    return float((ours.exp() * (rewards - BETA * (ours - theirs)))[possible].sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_near_to_a_known_optimum_and_does_not_pass_it(family: str) -> None:
    policy = says_a_or_b(family)
    ours, theirs, rewards = all_answers(policy)
    start = objective(ours, theirs, rewards)
    assert start == pytest.approx(0.5, abs=0.1)
    best = BETA * float(torch.logsumexp(theirs + rewards / BETA, 0))
    assert best == pytest.approx(two_outcomes(1 - start, 0.0, 1.0, BETA).objective, abs=1e-4)
    steps = 30
    ppo = trainer(
        policy, steps, reward=says_b, beta=BETA, max_response_tokens=2, unfinished_penalty=0.0, episodes=32,
        batch_size=32, learning_rate=0.003, value_learning_rate=0.03, epochs=4, minibatches=1,
    )  # fmt: skip
    row = prompts(policy, ONE)
    for number in range(steps):
        ppo.step(number, ONE * 32, row * 32)
    reached = objective(*all_answers(policy))
    assert reached <= best + 1e-5
    assert reached > 0.95 * best
