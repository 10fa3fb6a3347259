"""Toy models of both families, built in memory, and the settings to train them."""

from pathlib import Path
from typing import Any

import torch

from tasks.data.synthetic import documents
from tasks.lm.architecture import Architecture
from tasks.lm.model import LanguageModel
from tasks.lm.schedule import Schedule
from tasks.lm.scratch import build
from tasks.stage import Compute, Context, NullTrack

FAMILIES = ("t5", "llama")
COMPUTE = Compute(device="cpu", precision="fp32", threads=1, processes=1, accelerate=None)
GREEDY = {"max_new_tokens": 8, "do_sample": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": None},
    "qlora": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": None},
    "prompt_tuning": {"virtual_tokens": 4},
    "prefix_tuning": {"virtual_tokens": 4},
    "ia3": {"target_modules": None, "feedforward_modules": None},
    "bitfit": {"parameters": ["bias", "norm"]},
}
METHODS = tuple(method for method in OPTIONS if method != "qlora")

ARCHITECTURE = {
    "d_model": 32,
    "layers": 1,
    "heads": 4,
    "d_ff": 64,
    "dropout": 0.0,
    "positions": 512,
    "vocabulary": 400,
    "added_tokens": ["#Person1#", "#Person2#"],
}
SCHEDULE: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 4,
    "micro_batch_size": None,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "clip": 1.0,
    "evaluations": 2,
    "log_every": 2,
    "checkpoint_every": 4,
}


def unsaved(schedule: dict[str, Any]) -> dict[str, Any]:
    """The schedule without checkpoints, for runs that nobody interrupts: saving an adapter takes as long as ten
    steps."""
    return {**schedule, "checkpoint_every": 1000}


def texts(count: int = 60, seed: int = 5) -> list[str]:
    return list(documents(seed, count))


def toy(family: str, seed: int = 0, **changes: Any) -> LanguageModel:
    """A model with random weights, of a size that makes its answers differ from prompt to prompt."""
    torch.manual_seed(seed)
    architecture = Architecture.model_validate({**ARCHITECTURE, "family": family, **changes})
    lm = build(architecture, texts(), sentinels=12)
    embeddings = lm.model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_({"t5": 0.2, "llama": 4}[family] if parameter is embeddings else 4)
    return lm


def shake(lm: LanguageModel, by: float = 0.1) -> None:
    """Move what can be trained, as training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * by)


def schedule(**changes: Any) -> Schedule:
    return Schedule.model_validate({**SCHEDULE, **changes})


def context(folder: Path, name: str = "toy", seed: int = 1, track: NullTrack | None = None) -> Context:
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    return Context(name=name, seed=seed, compute=COMPUTE, work=work, track=track or NullTrack())
