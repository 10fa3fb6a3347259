"""From answers to metrics/evaluate.json, with answers whose scores are known."""

from typing import Any

import numpy as np
import pytest

from tasks.data.records import Example
from tasks.metrics.measures import toxicity
from tasks.metrics.report import differences_table, scores_table, splits_table, tasks_table
from tasks.metrics.results import Answered, Answers, results
from tasks.metrics.toxicity import oracle

NAMES = ("Ann", "Ben", "Cal", "Dan", "Eve", "Fay")


def example(index: int, task: str) -> Example:
    name = NAMES[index]
    return Example(
        id=f"{task}-{index}",
        task=task,
        instruction=f"Do the {task}.",
        input=f"{name}: hello",
        outputs=(f"{name} says a friendly hello",),
        group=name,
        slots={"who": name},
        split="test" if index < 2 else None,
    )


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    test = {task: [example(index, task) for index in range(6)] for task in ("greet", "act")}
    right = [one.reference for one in test["greet"]]
    held_out_right = [*right[:2], *["nothing to see, you fool"] * 4]
    ones = np.ones(6)
    answered = Answered(
        main={"tuned": Answers(right, ones, 2 * ones), "base": Answers(held_out_right, 3 * ones, 2 * ones)},
        baselines={"lead_1": [one.input for one in test["greet"]]},
        tasks={"tuned": {"act": held_out_right}, "base": {"act": right}},
        decoding={"greedy": right[:3], "top_k": held_out_right[:3]},
    )
    scored: list[int] = []
    found = results(
        test,
        answered,
        tuned="tuned",
        toxicity=lambda texts: toxicity(oracle(texts), 0.5),
        samples=200,
        seed=0,
        advance=lambda: scored.append(1),
    )
    assert len(scored) == 2 + 1 + 2 + 2
    return found


def test_each_answer_counts_where_it_belongs(metrics: dict[str, Any]) -> None:
    assert metrics["tuned"]["exact_match"] == metrics["tuned"]["slot_f1"] == metrics["tuned"]["bleu"] == 1
    assert metrics["base"]["exact_match"] == 0.333333
    assert metrics["base"]["toxicity_rate"] == 0.666667
    assert metrics["tuned"]["perplexity"] == round(float(np.exp(0.5)), 6)
    assert metrics["base"]["perplexity"] == round(float(np.exp(1.5)), 6)
    assert metrics["baselines"]["lead_1"]["slot_f1"] == 1
    assert metrics["decoding"]["top_k"]["exact_match"] == 0.666667


def test_held_out_and_seen_examples_are_told_apart(metrics: dict[str, Any]) -> None:
    parts = metrics["splits"]["base"]
    assert (parts["held_out"]["exact_match"], parts["seen"]["exact_match"]) == (1, 0)
    assert (parts["held_out"]["slot_f1"], parts["seen"]["slot_f1"]) == (1, 0)


def test_what_tuning_gained_and_forgot(metrics: dict[str, Any]) -> None:
    tasks = metrics["tasks"]
    assert tasks["tuned"]["greet"]["exact_match"] - tasks["base"]["greet"]["exact_match"] == 0.666667
    assert round(tasks["tuned"]["act"]["exact_match"] - tasks["base"]["act"]["exact_match"], 6) == -0.666667


def test_differences_are_tuned_minus_the_other(metrics: dict[str, Any]) -> None:
    base = metrics["differences"]["base"]
    assert base["slot_f1"] == pytest.approx(1 - metrics["base"]["slot_f1"])
    assert base["rougeL_low"] > 0
    assert set(metrics["differences"]) == {"base", "lead_1"}


def test_tables_show_these_numbers(metrics: dict[str, Any]) -> None:
    assert "| tuned | 1.000 | 1.000 | 1.000 [1.000, 1.000] | 1.000 | 1.000 |" in scores_table(metrics)
    assert "| lead_1 |" in scores_table(metrics)
    assert "| – |" in scores_table(metrics).splitlines()[2]  # a baseline has no perplexity
    assert "| act | Exact match | 1.000 | 0.333 |" in tasks_table(metrics)
    assert "| base, held-out | 1.000 | 1.000 [1.000, 1.000] |" in splits_table(metrics)
    assert "| base | +" in differences_table(metrics)


def test_without_pinned_examples_there_are_no_parts(metrics: dict[str, Any]) -> None:
    rows = [example(index, "greet") for index in range(2, 6)]
    texts = [one.reference for one in rows]
    answered = Answered({"one": Answers(texts, np.ones(4), np.ones(4))}, {}, {}, {"greedy": texts})
    found = results({"greet": rows}, answered, "one", lambda texts: {}, 50, 0, lambda: None)
    assert found["splits"] == found["tasks"] == found["differences"] == {}
