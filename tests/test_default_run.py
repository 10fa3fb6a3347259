"""The results in git are those of the code and the params in git."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows import pipeline

MADE_BY_RUNNING = ("data/", "models/")  # not in git: a fresh clone has none of it


@pytest.fixture(scope="module")
def evaluation(repository: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((repository / "metrics/evaluate.json").read_text())
    return found


def test_no_code_param_or_result_changed_since_the_committed_run(repository: Path) -> None:
    """After a change of code or params: run the pipeline, then `python docs/tables.py`, and commit both."""
    graph = pipeline.read_graph(repository)
    changes = pipeline.changes(repository, list(graph))
    assert {
        name: [str(change) for change in found if not change.what.startswith(MADE_BY_RUNNING)]
        for name, found in changes.items()
    } == {name: [] for name in graph}


@pytest.mark.parametrize("metric", ["rougeL", "slot_f1"])
def test_tuning_beats_the_base_and_every_baseline_with_intervals_apart(
    evaluation: dict[str, Any], metric: str
) -> None:
    others = {name: evaluation[name] for name in evaluation if name.startswith("base") and name != "baselines"}
    assert set(others) >= {"base", "base_few_shot"}
    for name, scores in {**others, **evaluation["baselines"]}.items():
        assert scores[f"{metric}_high"] < evaluation["finetune"][f"{metric}_low"], name


def test_tuning_trains_less_than_a_tenth_of_the_parameters(repository: Path) -> None:
    tuned = json.loads((repository / "metrics/finetune.json").read_text())
    base = json.loads((repository / "metrics/base.json").read_text())
    assert tuned["trainable_parameters"] < base["parameters"] / 10
