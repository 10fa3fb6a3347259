"""Items to rank, without a model, and a toy repository whose run waits for rankings."""

from pathlib import Path

import yaml
from toy import Toy, build

from tasks.labels.sheet import Answer, Item

PARAMS = """\
from typing import Any

from tasks.stage import Section


class Params(Section):
    source: dict[str, Any]
"""
TEXTS = ["Somebody wants the report.", "<b>Somebody</b> **shouts**.", "Nothing."]
VARIANTS = ["base", "finetune", "ppo"]


def items(count: int, of: str = "a day", texts: list[str] = TEXTS) -> list[Item]:
    return [
        Item(
            prompt=f"Summarize {of} ({number}).\n\n#Person1#: Where is it?",
            group=f"{of} {number}",
            answers=tuple(
                Answer(text=text, variants=(name,)) for text, name in zip(texts, VARIANTS, strict=True)
            ),
        )
        for number in range(count)
    ]


def toy_that_waits(root: Path) -> Toy:
    """Stages by the names of the real ones, the first two of which read inputs/."""
    toy = build(root, {"prepare": [], "feedback": ["prepare"], "reward": ["feedback"]}, light=True)
    (root / "inputs").mkdir()
    (root / "inputs" / "README.md").write_text("data of your own\n")
    graph = yaml.safe_load((root / "dvc.yaml").read_text())
    for name in ("prepare", "feedback"):
        graph["stages"][name]["deps"].append("inputs")
    (root / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    (root / "tasks" / "feedback.py").write_text(PARAMS)
    params = toy.params() | {"feedback": {"source": {"kind": "rankings"}}}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return toy
