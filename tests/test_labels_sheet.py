"""The sheet of prompts and answers that is put before labelers, made with toy models."""

from pathlib import Path
from typing import Any

import pytest
from lm_stages import lay_out
from lm_toys import COMPUTE, toy

from tasks.labels import sheet
from tasks.labels.sheet import Recipe
from tasks.lm.model import save
from tasks.stage import DataError

RECIPE = Recipe(
    variants=("finetune", "ppo"), samples=2, temperature=1.0, task="summarize", split="train", prompts=6, seed=1
)


def test_a_sheet_has_answers_of_every_variant_and_is_the_same_again(tmp_path: Path) -> None:
    root = lay_out(tmp_path, documents=2).root
    models = {}
    for seed, name in enumerate(RECIPE.variants):
        models[name] = root / "models" / name
        save(toy("t5", seed), models[name])
    told: list[int] = []
    options: dict[str, Any] = {
        "batch_size": 4,
        "max_prompt_tokens": 64,
        "compute": COMPUTE,
        "progress": told.append,
    }
    generation = {"do_sample": False, "num_beams": 1, "max_new_tokens": 6}
    made = sheet.make(RECIPE, root / "data" / "examples", models, generation, **options)
    assert sum(told) == 6 * 2 * 2
    assert 0 < len(made.items) <= 6
    assert all(2 <= len(item.answers) <= 4 for item in made.items)
    assert {name for item in made.items for answer in item.answers for name in answer.variants} == set(models)
    sheet.write(root / "sheet.json", made)
    assert sheet.read(root / "sheet.json") == made
    assert sheet.make(RECIPE, root / "data" / "examples", models, generation, **options) == made

    greedy = RECIPE.model_copy(update={"variants": ("ppo",), "temperature": 0.0})
    with pytest.raises(DataError, match="all answers to each prompt are the same"):
        sheet.make(greedy, root / "data" / "examples", models, generation, **options)
    unknown = RECIPE.model_copy(update={"task": "translate"})
    with pytest.raises(DataError, match=r"train.jsonl has no example of the task translate: name another"):
        sheet.make(unknown, root / "data" / "examples", models, generation, **options)
