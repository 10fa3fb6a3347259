"""Every preset merges with params.yaml and is allowed; `smoke` runs the pipeline through the real commands."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_host
import pytest
import yaml
from lm_stages import WARM
from prefect_server import PrefectServer

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


@dataclass(frozen=True)
class Clone:
    """A copy of this repository as it stands, changes that are not committed included."""

    root: Path

    def call(
        self,
        *command: str,
        tracking: str = "off",
        run: Callable[..., "subprocess.CompletedProcess[str]"] = command_host.run,
    ) -> str:
        """What a command writes that ends well."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "LIFECYCLE_TRACKING": tracking, **WARM}
        done = run([sys.executable, "-m", *command], self.root, environment, SECONDS)
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def lock(self) -> Any:
        return yaml.safe_load((self.root / "dvc.lock").read_text())

    def metrics(self) -> dict[str, str]:
        return {path.stem: path.read_text() for path in (self.root / "metrics").glob("*.json")}

    def starts(self) -> dict[str, str]:
        """What each stage's process wrote when it ended."""
        return {path.parent.name: path.read_text() for path in (self.root / ".work").glob("*/last.json")}


@pytest.fixture(scope="module")
def clone(
    tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path, prefect_server: PrefectServer
) -> Iterator[Clone]:
    """Where `lifecycle run --preset smoke` has run, and recorded itself at the server that the tests share."""
    root = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file() and Path(name).parts[0] not in ("dvc.lock", "metrics", "reports"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    shutil.copy(mlflow_template, root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(prefect_server.home))
        patch.setenv("PREFECT_API_URL", prefect_server.url)
        clone = Clone(root)
        clone.call("flows.cli", "run", "--preset", "smoke", tracking="on", run=command_host.run_plainly)
        yield clone


def test_smoke_runs_every_stage_and_leaves_its_metrics(clone: Clone) -> None:
    stages = set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    assert set(clone.metrics()) == set(clone.starts()) == set(clone.lock()["stages"]) == stages
    evaluation = json.loads(clone.metrics()["evaluate"])
    for variant in ("base", "base_few_shot", "finetune"):
        assert set(evaluation[variant]) >= SCORES
    for baseline in ("lead_1", "longest_turn", "nearest_summary"):
        assert set(evaluation["baselines"][baseline]) >= SCORES - {"perplexity"}


def test_a_second_run_starts_no_process_and_dvc_agrees(clone: Clone) -> None:
    starts, lock = clone.starts(), clone.lock()
    result = json.loads(clone.call("flows.cli", "run", "--json"))
    assert {stage["state"] for stage in result["stages"]} == {"cached"}
    assert "up to date" in clone.call("dvc", "repro")
    assert (clone.starts(), clone.lock()) == (starts, lock)


def test_a_stage_again_by_force_leaves_the_same_bytes_and_what_needs_it_as_it_is(clone: Clone) -> None:
    """The first of all; the tests of each other stage run it twice."""
    starts, lock, metrics = clone.starts(), clone.lock(), clone.metrics()
    clone.call("flows.cli", "run", "--force", "--stage", "prepare")
    after = clone.starts()
    assert {stage for stage in after if after[stage] != starts[stage]} == {"prepare"}
    assert clone.lock() == lock
    assert clone.metrics() == metrics
