"""What an answer is worth: the parts of a reward, and their sum."""

import math
from pathlib import Path
from typing import Any

import pytest
from classifier_toys import toy_classifier
from ppo_toys import EXAMPLES

from tasks.lm.classifier import save_classifier
from tasks.rlhf.scoring import weighted_sum
from tasks.rlhf.settings import LengthPart, ModelPart, OraclePart
from tasks.stage import Compute

COMPUTE = Compute(device="cpu", precision="fp32", threads=None, processes=1, accelerate=None)
ANSWERS = ["the fool #Person1# asks", "#Person1# asks", "#Person1# asks #Person2# to call the office"]
ASKED = EXAMPLES[:3]


def test_parts_are_weighted_and_told_apart() -> None:
    reward = weighted_sum(
        {
            "clean": OraclePart(kind="oracle", weight=2.0),
            "short": LengthPart(kind="length", free_words=2, weight=-0.5),
        },
        COMPUTE,
    )
    found = reward(ASKED, ANSWERS)
    assert found.parts == {"clean": [0.0, 2.0, 2.0], "short": [-1.0, 0.0, -2.5]}
    assert found.total == [-1.0, 2.0, -0.5]


@pytest.mark.parametrize("squash", [0.0, -2.0])
def test_a_squashed_score_is_one_half_where_it_says(squash: float, tmp_path: Path) -> None:
    save_classifier(toy_classifier("t5", tmp_path / "start"), tmp_path / "reward")

    def scored(**changes: Any) -> list[float]:
        part = ModelPart(
            **{
                "kind": "model",
                "source": str(tmp_path / "reward"),
                "revision": None,
                "label": None,
                "squash": None,
                "batch_size": 2,
                "weight": 1.0,
                **changes,
            }
        )
        return weighted_sum({"preferred": part}, COMPUTE)(ASKED, ANSWERS).total

    plain, squashed = scored(), scored(squash=squash)
    assert len(set(plain)) > 1
    assert squashed == pytest.approx([1 / (1 + math.exp(squash - score)) for score in plain], abs=1e-6)
