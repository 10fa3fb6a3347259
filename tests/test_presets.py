"""Every preset merges with params.yaml and is allowed; `smoke` runs the pipeline through the real commands."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.params_file import change
from tasks.stage import ParamsError
from tasks.stage.params import check_all

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
SECONDS = 300
SCORES = {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "exact_match", "slot_f1"} | {
    "perplexity",
    "toxicity_rate",
    "toxicity_mean",
    "length_ratio",
}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with params.yaml, dvc.yaml and the presets."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    return tmp_path


def test_the_presets_that_the_documents_name_are_there() -> None:
    assert {"smoke", "causal", "flan-t5-base", "qwen2.5-0.5b", "your-own-data"} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_allowed_and_changes_what_it_says(preset: str, bare: Path) -> None:
    assert change(bare, presets=[preset])
    check_all(bare / "params.yaml", bare / "dvc.yaml")
    merged = yaml.safe_load((bare / "params.yaml").read_text())
    assert_within(yaml.safe_load((bare / "presets" / f"{preset}.yaml").read_text()), merged, preset)
    assert change(bare, presets=[preset]) == []


def test_a_wrong_value_in_a_preset_is_refused(bare: Path) -> None:
    (bare / "presets" / "wrong.yaml").write_text("base: {architecture: {family: gpt}}\n")
    with pytest.raises(ParamsError, match=r"base.architecture.family: found \"gpt\""):
        change(bare, presets=["wrong"])


def assert_within(part: Any, whole: Any, where: str) -> None:
    if not isinstance(part, dict):
        assert part == whole, where
        return
    for key, value in part.items():
        assert_within(value, whole[key], f"{where}.{key}")


def test_what_is_commented_out_in_your_own_data_is_allowed_too(bare: Path) -> None:
    path = bare / "presets" / "your-own-data.yaml"
    before = yaml.safe_load(path.read_text())["prepare"]
    path.write_text(re.sub(r"^#(?= {4})", "", path.read_text(), flags=re.MULTILINE))
    after = yaml.safe_load(path.read_text())["prepare"]
    kinds = [source["kind"] for source in after["examples"]]
    assert kinds == ["file", "file", "hub", "synthetic"] and len(before["examples"]) == 1
    assert [source["kind"] for source in after["text"]["sources"]] == ["file", "file", "hub", "synthetic"]
    change(bare, presets=["your-own-data"])
    check_all(bare / "params.yaml", bare / "dvc.yaml")
