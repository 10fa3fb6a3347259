"""One backbone in the place of four models: what a policy is before training, and what training may change."""

from functools import partial
from typing import Any

import pytest
import torch
from lm_toys import FAMILIES
from ppo_toys import EXAMPLES, letters, new, prompts, rollout, trainer

from tasks.lm.collate import collate
from tasks.lm.respond import response_logits
from tasks.rlhf.losses import policy_loss
from tasks.rlhf.policy import Policy, copied, reads_once, trunk_of
from tasks.rlhf.rewards import k1
from tasks.rlhf.rollout import Rollout, part, respond_by_sampling
from tasks.stage import ParamsError

METHODS = ("lora", "full")


def whole(policy: Policy, found: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the sampled responses under the policy and under the reference, read at once."""
    batch, _ = part(policy, found.prompts, found.responses, range(len(found.prompts)))
    with torch.no_grad():
        return policy.evaluate(batch).logprobs, policy.reference_logprobs(batch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_policy_is_its_reference(family: str, method: str) -> None:
    policy = new(family, method)
    found = rollout(policy)
    mask = found.mask
    assert k1(found.responses.logprobs, found.ref_logprobs)[mask == 1].abs().max() < 1e-4  # read in other ways
    again, reference = whole(policy, found)
    assert k1(again, reference)[mask == 1].abs().max() < 1e-6
    loss = policy_loss(again, found.responses.logprobs, torch.ones_like(again), mask, clip=0.2)
    assert loss.clipped == 0
    assert float(loss.total) == pytest.approx(-float(mask.sum()), rel=1e-5)  # every ratio is 1
    assert torch.all(found.responses.values == 0)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_moves_all_that_is_trained_and_nothing_else(family: str, method: str, separate: bool) -> None:
    policy = new(family, method, separate)
    found = rollout(policy)
    _, before = whole(policy, found)
    trained = dict(policy.parameters())
    frozen = [each for each in policy.lm.model.parameters() if not each.requires_grad]
    were = {name: each.detach().clone() for name, each in trained.items()}
    frozen_were = [each.detach().clone() for each in frozen]
    ppo = trainer(policy)
    for number in range(2):  # LoRA's first factor has no gradient while the second is 0
        ppo.step(number, EXAMPLES, prompts(policy))
    still = [name for name, each in trained.items() if torch.equal(each, were[name])]
    # Attention to a response of one token has one weight, whatever its queries and keys.
    assert still == []
    assert all(torch.equal(each, was) for each, was in zip(frozen, frozen_were, strict=True))
    after, reference = whole(policy, found)
    assert torch.equal(reference, before)
    assert not torch.equal(after, before)
    assert {name.partition(".")[0] for name in trained} == {"policy", "value_head"} | (
        {"critic"} if separate else set()
    )


@pytest.mark.parametrize("separate", [False, True])
def test_an_encoder_that_is_not_trained_reads_a_prompt_once_and_nothing_changes(
    separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for once in (True, False):
        policy = new("t5", separate=separate, encoder=False)
        if not once:
            monkeypatch.setattr("tasks.rlhf.rollout.reads_once", lambda _: False)
        calls = {"policy": 0, "critic": 0}
        for name, lm in (("policy", policy.lm), ("critic", policy.critic)):
            if lm is not None:
                count = partial(_count, calls, name)
                lm.model.get_encoder().register_forward_hook(count)
        ppo = trainer(policy, steps=3, epochs=3, minibatches=1, batch_size=8)
        for number in range(3):
            ppo.step(number, EXAMPLES, prompts(policy))
        reads = (1, 1) if once else (1 + 1 + 3, 1 + 3)  # sampling, reference, values, three epochs
        assert calls == {"policy": 3 * reads[0], "critic": 3 * reads[1] * separate}
        seen.append({name: each.detach().clone() for name, each in policy.parameters()})
    assert seen[0]["value_head.weight"].abs().max() > 0
    for name, parameter in seen[0].items():
        assert torch.allclose(parameter, seen[1][name], atol=1e-4), name


def test_a_prompt_with_many_answers_is_read_once() -> None:
    policy = new("t5", encoder=False)
    read: list[int] = []

    def note(*seen: Any) -> None:
        read.append(len(seen[-1].last_hidden_state))

    policy.lm.model.get_encoder().register_forward_hook(note)
    asked = [*EXAMPLES, *EXAMPLES, *EXAMPLES]
    found = rollout(policy, asked)
    assert sum(read) == len({example.prompt for example in EXAMPLES})
    alone = rollout(policy, asked[:1])
    assert found.responses.answers[0] == alone.responses.answers[0]
    assert torch.allclose(found.ref_logprobs[0, : alone.mask.shape[1]], alone.ref_logprobs[0], atol=1e-5)


def _count(calls: dict[str, int], name: str, *_: object) -> None:
    calls[name] += 1


def test_a_trained_encoder_is_read_each_time() -> None:
    assert reads_once(new("t5", encoder=False).lm)
    assert not any(reads_once(new(*of).lm) for of in (("t5", "lora"), ("t5", "full"), ("llama", "lora")))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_temperature_is_part_of_the_policy(family: str) -> None:
    policy = new(family, temperature=2.0)
    found = rollout(policy)
    batch, _ = part(policy, found.prompts, found.responses, range(8))
    with torch.no_grad():
        logits = response_logits(policy.lm, batch)
    expected = (logits / 2).log_softmax(-1).gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
    mask = found.mask == 1
    assert torch.allclose(found.responses.logprobs[mask], expected[mask], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answering_model_is_plain_and_answers_as_the_policy_does(family: str) -> None:
    policy = new(family)
    ppo = trainer(policy)
    ppo.step(0, EXAMPLES, prompts(policy))
    answering = policy.answering()
    assert not any("lora" in name for name, _ in answering.model.named_parameters())
    batch = collate(policy.lm, prompts(policy), [[5, 6, 7]] * 8)
    with torch.no_grad():
        ours, theirs = response_logits(policy.lm, batch), response_logits(answering, batch)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert any("lora" in name for name, _ in policy.lm.model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_more_padding_changes_nothing(family: str) -> None:
    policy = new(family)
    rows = prompts(policy)
    uniforms = torch.rand(8, 8, generator=torch.Generator().manual_seed(3))
    together = respond_by_sampling(policy, rows, uniforms, batch_size=8)
    for row in range(8):
        alone = respond_by_sampling(policy, rows[row : row + 1], uniforms[row : row + 1], batch_size=1)
        width = int(alone.mask.sum())
        assert together.answers[row] == alone.answers[0]
        assert int(together.mask[row].sum()) == width
        assert bool(together.ended[row]) == bool(alone.ended[0])
        for field in ("logprobs", "values"):
            one, other = getattr(together, field)[row, :width], getattr(alone, field)[0, :width]
            assert torch.allclose(one, other, atol=1e-5)


def test_the_order_of_prompts_and_their_scores_is_kept() -> None:
    policy = new("t5")
    found = rollout(policy)
    assert found.scores.total == letters(EXAMPLES, found.responses.answers).total
    lengths = [len(prompt) for prompt in found.prompts]
    assert lengths != sorted(lengths), "or the test says nothing"
    batch, width = part(policy, found.prompts, found.responses, [2, 5])
    assert batch.response_ids.shape == (2, width)
    assert width == int(found.mask[[2, 5]].sum(dim=1).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trunk_begins_as_the_reward_model_and_no_other_shape_fits(family: str) -> None:
    from transformers import AutoModelForSequenceClassification

    policy = new(family)
    lm = copied(policy.answering())
    config = lm.model.config
    config.num_labels = 1
    config.pad_token_id = lm.tokenizer.pad_token_id
    classifier = AutoModelForSequenceClassification.from_config(config)
    trunk = trunk_of(classifier, lm)
    for name, weight in classifier.base_model.state_dict().items():
        assert torch.equal(trunk.model.base_model.state_dict()[name], weight)
    wider = AutoModelForSequenceClassification.from_config(
        type(config).from_dict({**config.to_dict(), "vocab_size": 700})
    )
    with pytest.raises(ParamsError, match=r"ppo.value.source: not of the architecture"):
        trunk_of(wider, lm)
