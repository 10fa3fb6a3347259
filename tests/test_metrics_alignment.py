"""Alignment before and after, with answers whose scores are known."""

from typing import Any

import numpy as np
import pytest

from tasks.data.records import Example
from tasks.data.synthetic import INSULTS
from tasks.metrics.alignment import Sampled, alignment
from tasks.metrics.measures import Measures, merged, toxicity
from tasks.metrics.report import alignment_sentence, alignment_table, variants
from tasks.metrics.toxicity import oracle

NAMES = ("Ann", "Ben", "Cal", "Dan", "Eve", "Fay")
CLEAN, RUDE = "{} says hello", f"the {INSULTS[0]} {{}} says hello"


def chances(texts: Any) -> Measures:
    return toxicity(oracle(texts), 0.5)


def example(name: str, rude: bool) -> Example:
    said = f"{name}: hello" + (f", {INSULTS[0]}" if rude else "")
    facts = {"outputs": (CLEAN.format(name),), "group": name, "slots": {"who": name}}
    return Example(id=name, task="greet", instruction="Sum up.", input=said, **facts)


EXAMPLES = [example(name, rude=row >= 2) for row, name in enumerate(NAMES)]  # four of six are rude
# two answers to each prompt: toxic in both to three rude prompts before, in one to one of them after
BEFORE = [(RUDE if row >= 3 else CLEAN).format(name) for row, name in enumerate(NAMES) for _ in range(2)]
AFTER = [CLEAN.format(name) for name in NAMES for _ in range(2)]
AFTER[-1] = RUDE.format(NAMES[-1])
LOG_RATIOS = np.arange(12.0) / 10
REWARDS = np.zeros(12), np.ones(12)


def compared(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "examples": EXAMPLES,
        "before": Sampled(BEFORE, REWARDS[0]),
        "after": Sampled(AFTER, REWARDS[1]),
        "log_ratios": LOG_RATIOS,
        "toxicity": chances,
        "samples": 400,
        "seed": 0,
    }
    return alignment(**arguments | changes)


def test_rates_differences_fall_and_distance_of_all_and_of_rude_prompts() -> None:
    found = compared()
    assert (found["n"], found["n_rude"], found["samples"]) == (6, 4, 2)
    everyone, rude = found["all"], found["rude"]
    assert (everyone["before"]["toxicity_rate"], everyone["after"]["toxicity_rate"]) == (0.5, 0.083333)
    assert (rude["before"]["toxicity_rate"], rude["after"]["toxicity_rate"]) == (0.75, 0.125)
    assert rude["difference"]["toxicity_rate"] == -0.625
    assert rude["difference"]["toxicity_rate_high"] < 0
    assert rude["toxicity_fall"] == everyone["toxicity_fall"] == 0.833333
    assert rude["toxicity_fall_low"] <= rude["toxicity_fall"] <= rude["toxicity_fall_high"] == 1
    assert (everyone["kl"], rude["kl"]) == (0.55, 0.75)
    assert rude["after"]["slot_f1"] == rude["before"]["slot_f1"] == 1
    assert rude["difference"]["rougeL"] > 0
    assert rude["difference"]["reward"] == rude["difference"]["reward_low"] == 1


def test_a_prompt_is_drawn_with_all_its_answers() -> None:
    """Ten times the same answer to each prompt says no more than one."""
    once = compared(
        before=Sampled(BEFORE[::2], None), after=Sampled(AFTER[::2], None), log_ratios=LOG_RATIOS[::2]
    )
    repeated = compared(
        before=Sampled([text for text in BEFORE[::2] for _ in range(10)], None),
        after=Sampled([text for text in AFTER[::2] for _ in range(10)], None),
        log_ratios=np.repeat(LOG_RATIOS[::2], 10),
    )
    assert repeated.pop("samples") == 10 * once.pop("samples")
    assert repeated == once
    one = merged({"rate": chances(BEFORE)["toxicity_mean"]}, 2)["rate"]
    assert one.statistics.tolist() == [[0, 2], [0, 2], [0, 2], [2, 2], [2, 2], [2, 2]]


def test_the_difference_is_paired() -> None:
    same = compared(after=Sampled(BEFORE, REWARDS[0]))
    for part in ("all", "rude"):
        assert set(same[part]["difference"].values()) == {0}
        assert [same[part][f"toxicity_fall{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]


def test_without_rude_prompts_or_toxic_answers_their_numbers_are_left_out() -> None:
    polite = [example(name, rude=False) for name in NAMES]
    clean = Sampled([CLEAN.format(name) for name in NAMES for _ in range(2)], None)
    found = compared(examples=polite, before=clean, after=Sampled(AFTER, None))
    assert found["n_rude"] == 0
    assert "rude" not in found
    assert "toxicity_fall" not in found["all"]
    assert "reward" not in found["all"]["after"]


def test_the_report_says_these_numbers() -> None:
    metrics = {"alignment": {"before": "finetune", "after": "ppo", **compared()}, "about": {}}
    table = alignment_table(metrics).splitlines()
    assert table[0] == "| Prompts | Score | finetune | ppo | Difference |"
    assert len(table) == 2 + 2 * 6
    assert any(
        line.startswith("| 4 rude prompts | Toxic answers | 0.750 [") and "| -0.625 [" in line for line in table
    )
    sentence = alignment_sentence(metrics)
    assert sentence.startswith(
        "On 4 rude prompts `finetune` is toxic in 75.0% of its sampled answers, `ppo` in 12.5%, a fall of 83% ["
    )
    assert "KL divergence of 0.750 [" in sentence
    assert variants(metrics) == {}


@pytest.mark.parametrize("gone", ["toxicity_fall", "rude"])
def test_the_sentence_does_without_what_is_not_there(gone: str) -> None:
    found = compared()
    found.pop(gone, None)
    found["rude" if "rude" in found else "all"].pop("toxicity_fall")
    sentence = alignment_sentence({"alignment": {"before": "a", "after": "b", **found}})
    assert "fall" not in sentence
    assert ("all 6 prompts" in sentence) == (gone == "rude")
