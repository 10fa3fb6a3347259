"""Params of `distill` and `prune` on toy sizes, and a folder in which they run."""

from pathlib import Path
from typing import Any

from lm_stages import SCHEDULE_HERE, Workplace, lay_out
from lm_toys import toy

from tasks.lm.model import save

STUDENT: dict[str, Any] = {
    "start": "teacher",
    "width": None,
    "encoder": 1,
    "decoder": 1,
    "heads": 2,
    "head_size": None,
    "channels": 32,
    "calibration": 6,
}


def distill_section(**changes: Any) -> dict[str, Any]:
    return {
        "teacher": {"source": "models/ppo", "revision": None},
        "student": STUDENT,
        "labels": "teacher",
        "method": "soft",
        "soft": {"alpha": 0.5, "temperature": 2.0, "top_k": 8, "states": 1.0, "kept_gb": 1.0},
        "on_policy": {"share": 0.5, "beta": 0.5, "temperature": 1.0},
        "examples": 32,
        "max_prompt_tokens": 96,
        "max_response_tokens": 8,
        "batch_size": 16,
        "schedule": SCHEDULE_HERE,
        "learning_rate": 0.01,
        "control": None,
        "task": "summarize",
        "held_out": 8,
        "toxicity": {"backend": "oracle"},
        **changes,
    }


def with_dense(root: Path, family: str) -> Workplace:
    """Data, and a toy model of two layers as if aligned."""
    workplace = lay_out(root)
    save(toy(family, layers=2), root / "models" / "ppo")
    return workplace


def prune_section(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"source": "models/ppo", "revision": None},
        "method": "wanda",
        "pattern": "unstructured",
        "scope": "row",
        "sparsity": 0.5,
        "calibration": 6,
        "recovery": None,
        "max_prompt_tokens": 96,
        "max_response_tokens": 8,
        "batch_size": 16,
        "sweep": {
            "methods": ["magnitude", "wanda"],
            "patterns": ["unstructured", "structured"],
            "sparsities": [0.3, 0.9],
            "prompts": 4,
        },
        "task": "summarize",
        "held_out": 8,
        "toxicity": {"backend": "oracle"},
        **changes,
    }


RECOVERY: dict[str, Any] = {
    "examples": 32,
    "learning_rate": 0.02,
    "lora": {"r": 2, "alpha": 4, "dropout": 0, "target_modules": "all-linear"},
    "schedule": SCHEDULE_HERE,
}
