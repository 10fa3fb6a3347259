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

    The examples of one task alone, where params ask for that, are not told from the others. Steps of `evaluate`
    are the batches of answers of all variants to the main task.
    """
    section = data[stage]
    if stage == "ppo":
        return int(section["steps"])
    if stage == "base":
        learnt, tokens = section["pretraining"], tokens_of_text(root)
        if learnt is None or tokens is None:
            return None
        rows = int(tokens / section["max_tokens"])
        return max(1, _batches(rows, learnt["schedule"]))
    if stage == "evaluate":
        asked = section["examples"]["main_task"]
        examples = _lines(root / "data/examples/test.jsonl") if asked is None else asked
        return (
            None if examples is None else math.ceil(examples * len(section["variants"]) / section["batch_size"])
        )
    examples = _lines(root / ("data/feedback/train.jsonl" if stage == "reward" else EXAMPLES))
    return None if examples is None else _batches(examples, section["schedule"])


def _batches(rows: int, schedule: Mapping[str, Any]) -> int:
    found: int = int(rows * schedule["epochs"]) // schedule["batch_size"]
    return found


def _lines(file: Path) -> int | None:
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        return sum(1 for _ in lines)
