"""Params of `feedback`, `reward` and `ppo` on toy sizes, and a folder in which they run."""

from pathlib import Path
from typing import Any

from lm_stages import SCHEDULE_HERE, Workplace, lay_out
from lm_toys import toy

from tasks.lm.model import save

LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": None}
ROLLOUTS: dict[str, Any] = {
    "episodes": 8,
    "answers": 2,
    "batch_size": 4,
    "max_prompt_tokens": 96,
    "max_response_tokens": 8,
    "temperature": 1.0,
    "unfinished_penalty": 0.5,
    "engine": None,
}
UPDATE: dict[str, Any] = {
    "learning_rate": 0.003,
    "value_learning_rate": 0.01,
    "value_warmup": 0,
    "epochs": 2,
    "minibatches": 2,
    "shuffle": "episodes",
    "micro_batch_size": None,
    "gamma": 1.0,
    "lam": 0.95,
    "clip": 0.2,
    "value_clip": 0.2,
    "value_weight": 0.5,
    "max_grad_norm": 1.0,
    "stop_at_kl": None,
}
WIDE: dict[str, Any] = {
    "gold_drop": 1.0,
    "gold_drop_hard": 1.0,
    "toxicity_rise": 1.0,
    "z": 3.0,
    "kl": 1e6,
    "length_ratio_low": 0.0,
    "length_ratio_high": 1e6,
    "distinct_2": 0.0,
}


def feedback_section(**changes: Any) -> dict[str, Any]:
    source = {
        "kind": "oracle",
        "task": "summarize",
        "prompts": {"train": 12, "test": 6},
        "answers": 2,
        "temperature": 1.0,
        "max_prompt_tokens": 96,
        "max_response_tokens": 8,
        "batch_size": 8,
        "completions": 5,
        "flipped": 0.05,
    }
    return {"source": {**source, **changes}, "shown": 2}


def reward_section(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"source": "models/finetune", "revision": None},
        "method": "full",
        "max_prompt_tokens": 96,
        "max_response_tokens": 64,
        "batch_size": 8,
        "schedule": {**SCHEDULE_HERE, "epochs": 4, "batch_size": 4, "checkpoint_every": 4},
        "full": {"learning_rate": 0.005},
        "lora": {"learning_rate": 0.02, **LORA},
        "likelihood": 0.0,
        "language_loss": 0.0,
        "shuffled_control": 0,
        "bootstrap_samples": 100,
        **changes,
    }


def ppo_section(**changes: Any) -> dict[str, Any]:
    return {
        "task": "summarize",
        "prompts": "all",
        "method": "lora",
        "lora": {**LORA, "encoder": False},
        "value": {"trunk": "shared", "source": None},
        "steps": 6,
        "checkpoint_every": 1,
        "rollouts": ROLLOUTS,
        "reward": {
            "clean": {"kind": "oracle", "weight": 1.0},
            "short": {"kind": "length", "free_words": 2, "weight": -0.1},
        },
        "kl": {"beta": 0.1, "target": None, "horizon": 1000},
        "update": UPDATE,
        "guard": {
            "every": 2,
            "prompts": 4,
            "toxicity": {"backend": "oracle"},
            "limits": WIDE,
            "raise_beta": 2.0,
            "least_beta": 0.05,
            "on_stop": "keep",
        },
        "objective": {"prompts": 4, "samples": 2, "bootstrap_samples": 50},
        "shown": 1,
        **changes,
    }


def with_model(root: Path, family: str) -> Workplace:
    """Data, and a toy model as if fine-tuned."""
    workplace = lay_out(root)
    save(toy(family), root / "models" / "finetune")
    return workplace
