"""Gates: each says which, against what and by how much; a version that fails one changes nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from flows import promote
from tasks.metrics.bootstrap import Interval
from tasks.registry import store
from tasks.registry.gates import Candidate, Verdict, difference, latency_verdicts, verdicts
from tasks.registry.latency import mean_seconds, ratio_of_seconds
from tasks.registry.promote import Latency, Params
from tasks.stage import GateRefused, UserError
from tasks.stage.errors import exit_code
from tasks.stage.fingerprint import hash_path

ROOT = Path(__file__).parents[1]
SECTION: dict[str, Any] = {
    "scores": [
        {"score": "rougeL", "better": "higher", "bound": 0.5, "margin": 0.1},
        {"score": "toxicity_rate", "better": "lower", "bound": 0.05, "margin": 0.02},
    ],
    "forgetting": {"score": "rougeL", "against": "base", "margin": 0.1, "champion_margin": 0.2},
    "megabytes": {"bound": 2.0, "ratio": 1.5},
    "seconds": {"bound": 1.0, "ratio": 1.5, "prompts": 2, "repeats": 1, "bootstrap_samples": 100},
}
PARAMS = Params.model_validate(SECTION)

# MLflow's own tables, when they are first read
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def scores(rouge: float, toxicity: float = 0.0, width: float = 0.05) -> dict[str, float]:
    return {
        "rougeL": rouge, "rougeL_low": rouge - width, "rougeL_high": rouge + width,
        "toxicity_rate": toxicity, "toxicity_rate_low": toxicity, "toxicity_rate_high": toxicity,
    }  # fmt: skip


def candidate(rouge: float = 0.8, toxicity: float = 0.0, act: float = 0.6, size: int = 1_000_000) -> Candidate:
    evaluation = {
        "about": {"task": "summarize"},
        "tuned": scores(rouge, toxicity),
        "tasks": {
            "base": {"summarize": scores(0.1), "act": scores(0.6)},
            "tuned": {"summarize": scores(rouge), "act": scores(act)},
        },
    }
    return Candidate("1", "tuned", evaluation, size)


def failed(found: list[Verdict]) -> dict[str, float]:
    return {verdict.gate: round(verdict.short, 6) for verdict in found if not verdict.passed}


def test_a_good_first_version_passes_every_absolute_gate_and_no_other_is_there() -> None:
    found = verdicts(PARAMS, candidate(), None)
    assert failed(found) == {}
    assert [verdict.gate for verdict in found] == [
        "rougeL", "toxicity_rate", "rougeL on act less base's", "megabytes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rouge": 0.54}, {"rougeL": 0.01}),  # the low end is .49
        ({"toxicity": 0.06}, {"toxicity_rate": 0.01}),
        ({"act": 0.55}, {"rougeL on act less base's": round(0.05 + 0.05 * 2**0.5 - 0.1, 6)}),
        ({"size": 2_500_000}, {"megabytes": 0.5}),
    ],
)
def test_an_absolute_gate_takes_the_worse_end(changes: Any, expected: dict[str, float]) -> None:
    assert failed(verdicts(PARAMS, candidate(**changes), None)) == expected


@pytest.mark.parametrize(
    ("changes", "gate", "short"),
    [
        ({"rouge": 0.75}, "rougeL less the champion's", 0.05 + 0.05 * 2**0.5 - 0.1),
        ({"toxicity": 0.03}, "toxicity_rate less the champion's", 0.01),
        ({"act": 0.45}, "rougeL on act less the champion's", 0.15 + 0.05 * 2**0.5 - 0.2),
        ({"size": 1_600_000}, "megabytes over the champion's", 0.1),
    ],
)
def test_a_gate_against_the_champion(changes: Any, gate: str, short: float) -> None:
    params = Params.model_validate(SECTION | {"forgetting": SECTION["forgetting"] | {"margin": 1.0}})
    assert failed(verdicts(params, candidate(), candidate())) == {}, "the same again is not worse"
    assert failed(verdicts(params, candidate(**changes), candidate())) == {gate: round(short, 6)}


def test_the_interval_of_a_difference_adds_squares_and_keeps_asymmetry() -> None:
    found = difference(Interval(0.8, 0.7, 0.84), Interval(0.5, 0.47, 0.54))
    assert found == pytest.approx((0.3, 0.3 - (0.1**2 + 0.04**2) ** 0.5, 0.3 + (0.04**2 + 0.03**2) ** 0.5))


def test_a_line_says_which_gate_and_by_how_much() -> None:
    line = str(Verdict("rougeL", Interval(0.54, 0.49, 0.59), "at least", 0.5))
    assert line == "rougeL: 0.54 (0.49 to 0.59), at least 0.5 wanted: misses by 0.01"
    assert (
        str(Verdict("megabytes", Interval(1.0, 1.0, 1.0), "at most", 2.0)) == "megabytes: 1, at most 2 wanted"
    )


def test_latency_is_judged_alone_and_beside_the_champion() -> None:
    params = PARAMS.seconds
    ours, theirs = np.array([0.2, 0.4, 0.3]), np.array([0.1, 0.2, 0.15])
    mean, ratio = mean_seconds(ours, 200, 1), ratio_of_seconds(ours, theirs, 200, 1)
    assert mean.value == pytest.approx(0.3) and mean.low < 0.3 < mean.high
    assert ratio == pytest.approx((2.0, 2.0, 2.0)), "paired by prompt: always twice as long"
    assert failed(latency_verdicts(params, mean, None)) == {}
    assert failed(latency_verdicts(params, mean, ratio)) == {"seconds an answer over the champion's": 0.5}


def test_a_score_or_variant_that_is_not_there_is_named() -> None:
    params = Params.model_validate(SECTION | {"scores": [SECTION["scores"][0] | {"score": "slot_f1"}]})
    with pytest.raises(UserError, match=r"no slot_f1 of tuned in version 1; there are rougeL, toxicity_rate"):
        verdicts(params, candidate(), None)
    params = Params.model_validate(SECTION | {"forgetting": SECTION["forgetting"] | {"against": "bass"}})
    with pytest.raises(UserError, match=r"tasks of bass; it has those of base, tuned"):
        verdicts(params, candidate(), None)


def test_the_section_of_this_repository_judges_its_evaluation(repository: Path) -> None:
    params = yaml.safe_load((repository / "params.yaml").read_text())
    section = Params.model_validate(params["promote"])
    evaluation = json.loads((repository / "metrics" / "evaluate.json").read_text())
    found = verdicts(section, Candidate("1", params["register"]["variant"], evaluation, 3_500_000), None)
    assert failed(found) == {}
    with pytest.raises(ValidationError):
        Latency.model_validate(params["promote"]["seconds"] | {"prompts": 1})


# --- with a store


def version(folder: Path, number: int, rouge: float) -> None:
    """A version as it is stored, its model a text."""
    import mlflow

    packed = folder / f"stored{number}" / "artifacts" / "packed"
    (packed / "model").mkdir(parents=True)
    (packed / "model" / "weights").write_text(str(number))
    lineage = {
        "variant": "tuned",
        "outputs": {"data/examples": "aa.dir"},
        "model": {"bytes": 1_000_000, "sha256": hash_path(packed / "model")},
    }
    (packed / "lineage.json").write_text(json.dumps(lineage))
    (packed / "evaluate.json").write_text(json.dumps(candidate(rouge).evaluation))
    (packed / "prompts.json").write_text(json.dumps(["a", "b", "c"]))
    client = mlflow.MlflowClient()
    if number == 1:
        client.create_registered_model("toy")
    client.create_model_version("toy", str(packed.parents[1]))
    client.set_registered_model_alias("toy", "challenger", str(number))


@pytest.fixture
def workspace(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the params are, and a store with one version."""
    import mlflow

    mlflow.set_tracking_uri(mlflow_store)
    monkeypatch.chdir(tmp_path)
    register = yaml.safe_load((ROOT / "params.yaml").read_text())["register"] | {"name": "toy"}
    shared = {
        "seed": 1,
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1, "processes": 1, "accelerate": None},
    }
    Path("params.yaml").write_text(yaml.safe_dump(shared | {"register": register, "promote": SECTION}))
    monkeypatch.setattr(promote, "seconds", lambda models, prompts, repeats: np.ones((len(models), 2)) * 0.5)
    version(tmp_path, 1, 0.8)
    return tmp_path


def state() -> dict[str, Any]:
    """All that a promotion may change."""
    import mlflow

    client = mlflow.MlflowClient()
    found = client.search_model_versions("name = 'toy'")
    return {
        "aliases": {name: str(number) for name, number in client.get_registered_model("toy").aliases.items()},
        "tags": {str(each.version): dict(each.tags) for each in found},
    }


def test_promotion_moves_the_alias_and_says_over_whom(workspace: Path) -> None:
    promote.promote(*promote.judge("challenger"))
    assert state()["aliases"] == {"champion": "1"}
    with pytest.raises(UserError, match="version 1 is the champion already"):
        promote.judge("1")
    version(workspace, 2, 0.82)
    promote.promote(*promote.judge("challenger"))
    found = state()
    assert found["aliases"] == {"champion": "2"}
    assert (found["tags"]["1"]["promote.over"], found["tags"]["2"]["promote.over"]) == ("none", "1")
    gates = json.loads(found["tags"]["2"]["promote.verdicts"])
    assert all(gate["passed"] for gate in gates)
    assert "seconds an answer over the champion's" in [gate["gate"] for gate in gates]


def test_a_gate_that_says_no_changes_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promote.promote(*promote.judge("1"))
    version(workspace, 2, 0.53)
    before = state()
    ours, champion, found = promote.judge("challenger")
    promote.show(ours, champion, found)
    with pytest.raises(GateRefused) as refused:
        promote.promote(ours, champion, found)
    assert exit_code(refused.value) == 3
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("version 2 is not promoted: 2 of ")
    assert lines[1] == "rougeL: 0.53 (0.48 to 0.58), at least 0.5 wanted: misses by 0.02"
    assert lines[2].startswith("rougeL less the champion's: -0.27 ")
    assert state() == before
    assert "no      rougeL: 0.53" in capsys.readouterr().out


def test_a_stored_model_that_changed_is_not_judged(workspace: Path) -> None:
    (workspace / "stored1" / "artifacts" / "packed" / "model" / "weights").write_text("other")
    with pytest.raises(UserError, match="stored model of version 1 is not the one that was registered"):
        promote.judge("1")
    assert state()["aliases"] == {"challenger": "1"}


def test_an_unknown_version_is_told(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"the model toy has no version 7 in .*; it has 1"):
        promote.judge("7")
    assert store.look("toy", "champion") is None


def test_versions_are_timed_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.registry import latency

    script = "import sys, time\nprint('ready', flush=True)\n" + (
        "for line in sys.stdin:\n    print(len(line) * float(open('pace').read()), flush=True)\n"
    )
    (tmp_path / "timing.py").write_text(script)
    monkeypatch.setattr(latency, "TIMING", tmp_path / "timing.py")
    for name, pace in {"slow": "0.2", "quick": "0.1"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "pace").write_text(pace)
    taken = latency.seconds([tmp_path / "slow", tmp_path / "quick"], ["a", "abc"], 3)
    assert taken == pytest.approx(np.array([[0.8, 1.2], [0.4, 0.6]]))
    (tmp_path / "quick" / "pace").unlink()
    with pytest.raises(UserError, match="answers no more"):
        latency.seconds([tmp_path / "quick"], ["a"], 1)


def test_importing_the_gates_needs_no_mlflow() -> None:
    code = "import sys, tasks.registry.gates; print('mlflow' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
