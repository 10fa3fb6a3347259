"""How much there is to learn from: tokens of raw text, and the steps that the examples make."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BYTES_PER_TOKEN = 4  # of English text, about
TEXT, EXAMPLES = "data/text/train.jsonl", "data/examples/train.jsonl"


def tokens_of_text(root: Path) -> int | None:
    """About how many tokens the training text has, told from its size; None before there is any."""
    file = root / TEXT
    return file.stat().st_size // BYTES_PER_TOKEN if file.is_file() else None


def steps_of(stage: str, data: Mapping[str, Any], root: Path) -> int | None:
    """The steps of a stage: PPO's are in the params, the others' follow from the data; None before there are
    any.

    The examples of one task alone, where params ask for that, are not told from the others.
    """
    section = data[stage]
    if stage == "ppo":
        return int(section["steps"])
    if stage == "base":
        learnt = section["pretraining"]
        tokens = tokens_of_text(root)
        if learnt is None or tokens is None:
            return None
        rows: float = tokens / section["max_tokens"] * learnt["schedule"]["epochs"]
        batches: int = round(rows / learnt["schedule"]["batch_size"])
        return max(1, batches)
    if stage == "evaluate":
        asked = section["examples"]["main_task"]
        return None if asked is None else math.ceil(asked * len(section["variants"]) / section["batch_size"])
    file = root / ("data/feedback/train.jsonl" if stage == "reward" else EXAMPLES)
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        examples = sum(1 for _ in lines)
    steps: int = int(examples * section["schedule"]["epochs"]) // section["schedule"]["batch_size"]
    return steps
