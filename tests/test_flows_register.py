"""`lifecycle register`, `lineage` and `promote` as commands, on a toy repository with a real, tiny model."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_toys import COMPUTE
from lm_toys import toy as toy_model
from toy import Toy, build

from tasks.lm.model import save

ROOT = Path(__file__).parents[1]
SCORES = {"rougeL": 0.9, "rougeL_low": 0.88, "rougeL_high": 0.92}
EVALUATION = {
    "about": {"task": "summarize", "examples": 40},
    "base": SCORES,
    "tuned": SCORES,
    "baselines": {"lead_1": SCORES},
    "tasks": {"base": {"summarize": SCORES}, "tuned": {"summarize": SCORES}},
}
EVALUATE = """\
from typing import Any

from tasks.stage import Section


class Params(Section):
    variants: dict[str, dict[str, Any]]
    generation: dict[str, Any]
    batch_size: int
    max_prompt_tokens: int
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A committed repository in which the stages `tune` and `evaluate` have run."""
    toy = build(tmp_path_factory.mktemp("toy") / "toy", {"tune": [], "evaluate": ["tune"]}, light=True)
    root = toy.root
    (root / "tasks" / "evaluate.py").write_text(EVALUATE)
    (root / ".gitignore").write_text((root / ".gitignore").read_text() + "/models/\n/mlruns/\n/mlflow.db\n")
    (root / "inputs").mkdir()
    save(toy_model("t5"), root / "inputs" / "model")
    (root / "inputs" / "evaluate.json").write_text(json.dumps(EVALUATION))
    (root / "inputs" / "samples.jsonl").write_text('{"prompt": "Hello there"}\n{"prompt": "Hi"}\n')
    real = yaml.safe_load((ROOT / "params.yaml").read_text())
    variants = {
        "base": {"model": "elsewhere", "shots": 0},
        "tuned": {"model": "tuned", "shots": 0},
        "tuned_one_shot": {"model": "tuned", "shots": 1},
    }
    section = {
        "variants": variants,
        "generation": {"max_new_tokens": 4},
        "batch_size": 4,
        "max_prompt_tokens": 64,
    }
    gates = real["promote"] | {"scores": [{"score": "rougeL", "better": "higher", "bound": 0.5, "margin": 0.1}]}
    gates["seconds"] = gates["seconds"] | {"bound": 60.0, "repeats": 1}
    params = toy.params() | {
        "compute": COMPUTE.model_dump(),
        "evaluate": section,
        "register": real["register"] | {"name": "toy", "variant": "tuned"},
        "promote": gates,
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": _stages()}, sort_keys=False))
    toy.dvc("repro")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "all")
    return toy


def _stages() -> dict[str, Any]:
    """Stages that copy what was put under inputs."""
    return {
        "tune": {
            "cmd": "mkdir -p models && cp -r inputs/model models/tuned",
            "deps": ["inputs/model"],
            "params": ["tune"],
            "outs": ["models/tuned"],
        },
        "evaluate": {
            "cmd": "mkdir -p metrics reports/evaluate && cp inputs/evaluate.json metrics/ "
            "&& cp inputs/samples.jsonl reports/evaluate/",
            "deps": ["models/tuned", "inputs/evaluate.json", "inputs/samples.jsonl"],
            "params": ["evaluate"],
            "metrics": [{"metrics/evaluate.json": {"cache": False}}],
            "outs": [{"reports/evaluate/samples.jsonl": {"cache": False}}],
        },
    }


def git(root: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "toy" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *arguments], cwd=root, env={**os.environ, **names}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def store(made: Toy, mlflow_template: Path) -> str:
    """The store of the workspace."""
    return f"sqlite:///{shutil.copy(mlflow_template, made.root / 'mlflow.db')}"


def test_a_variant_is_registered_traced_and_promoted(made: Toy, store: str) -> None:
    answer = made.lifecycle("register", "--json", MLFLOW_TRACKING_URI=store)
    assert json.loads(answer.stdout) == {"name": "toy", "version": "1", "aliases": ["challenger"]}

    known = json.loads(made.lifecycle("lineage", "challenger", "--json", MLFLOW_TRACKING_URI=store).stdout)
    assert (known["variant"], known["stage"], known["dirty"]) == ("tuned", "tune", False)
    assert known["commit"] == git(made.root, "rev-parse", "HEAD")
    assert known["outputs"]["models/tuned"] == made.lock()["stages"]["tune"]["outs"][0]["md5"]
    assert set(known["inputs"]) == {"inputs/model", "inputs/evaluate.json", "inputs/samples.jsonl"}
    assert known["rebuild"][-1] == ".venv/bin/lifecycle run --stage tune --stage evaluate"

    done = made.lifecycle("promote", MLFLOW_TRACKING_URI=store)
    assert done.stdout.startswith("version 1; there is no champion yet\npassed  rougeL: 0.9 (0.88 to 0.92)")
    assert "passed  seconds an answer: " in done.stdout
    done = made.lifecycle("promote", "champion", code=2, MLFLOW_TRACKING_URI=store)
    assert done.stderr == "version 1 is the champion already\n"


def test_what_is_no_variant_or_cannot_be_served_is_refused(made: Toy, store: str) -> None:
    for variant, message in {
        "other": "other is none of evaluate.variants: base, tuned, tuned_one_shot\n",
        "tuned_one_shot": "tuned_one_shot has worked examples in its prompts, which no request brings: "
        "register one without\n",
        "base": "no stage in dvc.yaml makes models/elsewhere\n",
    }.items():
        assert made.lifecycle("register", variant, code=2, MLFLOW_TRACKING_URI=store).stderr == message


def test_what_git_or_dvc_do_not_vouch_for_is_refused(made: Toy, store: str, tmp_path: Path) -> None:
    toy = made.copy(tmp_path / "toy")
    weights = toy.root / "models" / "tuned" / "model.safetensors"
    state = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    done = toy.lifecycle("register", code=2, MLFLOW_TRACKING_URI=store)
    assert "models/tuned" in done.stderr and done.stderr.count("\n") == 1

    toy.set("tune", text="other")
    done = toy.lifecycle("register", code=2, MLFLOW_TRACKING_URI=store)
    assert done.stderr.startswith("code or params differ from the commit: commit them first")
    done = toy.lifecycle("register", "--allow-dirty", code=2, MLFLOW_TRACKING_URI=store)
    assert done.stderr.startswith("tune is not up to date (")
    assert 'param tune.text "tune" → "other"' in done.stderr
