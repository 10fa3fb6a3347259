"""A toy policy of either family with prompts and a reward, and PPO on them."""

from collections.abc import Sequence
from typing import Any

import torch
from alignment_stages import LORA, ROLLOUTS, UPDATE
from lm_toys import toy

from tasks.data.records import Example
from tasks.data.synthetic import examples as synthetic
from tasks.lm.collate import encode_prompts
from tasks.rlhf.policy import Policy, copied, new_policy
from tasks.rlhf.rollout import Rollout, Scores, collect
from tasks.rlhf.settings import Kl, Rollouts, Update
from tasks.rlhf.trainer import Ppo

EXAMPLES = [example for example in synthetic(3, 20) if example.task == "summarize"][:8]
KL = {"beta": 0.1, "target": None, "horizon": 1000}


def letters(examples: Sequence[Example], answers: Sequence[str]) -> Scores:
    """A reward: how many of an answer's letters are an e."""
    found = [answer.count("e") / (len(answer) + 1) for answer in answers]
    return Scores(found, {"letters": found})


def new(
    family: str,
    method: str = "lora",
    separate: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    encoder: bool = True,
) -> Policy:
    lm = toy(family, seed)
    lm.model.generation_config.eos_token_id = lm.tokenizer.eos_token_id
    torch.manual_seed(seed)
    options, critic = {**LORA, "encoder": encoder}, copied(lm) if separate else None
    return new_policy(lm, method, options, temperature, critic)  # type: ignore[arg-type]


def prompts(policy: Policy, rows: Sequence[Example] = EXAMPLES) -> list[list[int]]:
    return [list(ids) for ids in encode_prompts(policy.lm, [example.prompt for example in rows], 200)]


def rollout(policy: Policy, rows: Sequence[Example] = EXAMPLES, seed: int = 7, width: int = 8) -> Rollout:
    uniforms = torch.rand(len(rows), width, generator=torch.Generator().manual_seed(seed))
    return collect(policy, letters, rows, prompts(policy, rows), uniforms, batch_size=4)


def trainer(policy: Policy, steps: int = 4, **changes: Any) -> Ppo:
    update = {**UPDATE, **{name: value for name, value in changes.items() if name in UPDATE}}
    rollouts = {**ROLLOUTS, **{name: value for name, value in changes.items() if name in ROLLOUTS}}
    kl = {**KL, **{name: value for name, value in changes.items() if name in KL}}
    return Ppo(
        policy, changes.get("reward", letters), Kl(**kl), Rollouts(**rollouts), Update(**update), steps, seed=1
    )
