"""The `evaluate.Metric` modules: they work offline and say what the stage's functions say."""

from pathlib import Path
from typing import Any

import pytest

ANSWERS = ["testing one two", "Ann, that fool, comes", "nothing"]
REFERENCES = ["testing one", "Ann comes", "nothing"]
SLOTS = [{}, {"who": "Ann"}, {"who": "Ben"}]


@pytest.fixture(scope="module")
def modules() -> Any:
    """Imported late: `evaluate` takes seconds."""
    from tasks.metrics import modules

    return modules


def compute(metric: Any, cache: Path, **values: Any) -> dict[str, Any]:
    found: dict[str, Any] = metric(cache_dir=str(cache)).compute(predictions=ANSWERS, **values)
    return found


def test_rouge(modules: Any, tmp_path: Path) -> None:
    from tasks.metrics.rouge import rouge

    found = compute(modules.Rouge, tmp_path, references=REFERENCES)
    expected = rouge(ANSWERS, [[text] for text in REFERENCES])
    assert found == {name: pytest.approx(values.mean()) for name, values in expected.items()}


def test_bleu_with_its_signature(modules: Any, tmp_path: Path) -> None:
    from sacrebleu.metrics import BLEU

    found = compute(modules.Bleu, tmp_path, references=[[text, "something else"] for text in REFERENCES])
    expected = BLEU().corpus_score(ANSWERS, [REFERENCES, ["something else"] * 3]).score / 100
    assert found["bleu"] == pytest.approx(expected)
    assert found["signature"].startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp")


def test_exact_match_takes_one_or_several_references(modules: Any, tmp_path: Path) -> None:
    assert compute(modules.ExactMatch, tmp_path, references=REFERENCES) == {"exact_match": pytest.approx(1 / 3)}
    several = [[text, answer] for text, answer in zip(REFERENCES, ANSWERS, strict=True)]
    assert compute(modules.ExactMatch, tmp_path, references=several) == {"exact_match": 1}


def test_slot_f1(modules: Any, tmp_path: Path) -> None:
    found = compute(modules.SlotF1, tmp_path, references=REFERENCES, slots=SLOTS)
    assert found == {"slot_f1": pytest.approx(2 / 3)}


def test_toxicity(modules: Any, tmp_path: Path) -> None:
    from tasks.metrics.toxicity import oracle

    third = pytest.approx(1 / 3)
    found = compute(modules.Toxicity, tmp_path, scorer=oracle, toxic_from=0.5)
    assert found == {"toxicity_rate": third, "toxicity_mean": third}
    assert compute(modules.Toxicity, tmp_path, scorer=oracle, toxic_from=1.1)["toxicity_rate"] == 0
