"""`lifecycle plan`, and the check that `lifecycle run` makes before it starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import command_host
import psutil
import pytest
import yaml

from flows import plan
from flows.params_file import change
from tasks.planning import hardware
from tasks.stage.errors import GateRefused, ParamsError, UserError, exit_code

ROOT = Path(__file__).parents[1]


class Ram(NamedTuple):
    total: float


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The params and the graph of this repository, where no stage has run."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".work").mkdir()
    change(tmp_path, settings=["compute.device=cpu", "compute.threads=1"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lifecycle(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command_host.run([sys.executable, "-m", "flows.cli", *arguments], root, os.environ)


def test_the_command_refuses_and_names_what_makes_it_fit(workspace: Path) -> None:
    change(workspace, settings=["finetune.method=full", "base.architecture.d_model=512"])
    arguments = ("plan", "--stage", "finetune", "--memory", "900MB", "--flops", "5e10")
    refused = lifecycle(workspace, *arguments, "--json")
    assert refused.returncode == 3, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert line.startswith("finetune does not fit: it needs ")
    assert "are 900 MB; it would fit with: lifecycle run --set finetune." in line
    (entry,) = json.loads(refused.stdout)["stages"]
    assert not entry["fits"]

    settings = [f"{name}={value}" for name, value in entry["mended_by"].items()]
    change(workspace, settings=settings)
    mended = plan.look(workspace, ["finetune"], "900MB", 5e10)
    assert mended["stages"][0]["fits"]
    plan.refuse(mended)


def test_every_stage_has_a_plan_that_is_shown(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = workspace / "data" / "text"
    text.mkdir(parents=True)
    (text / "train.jsonl").write_bytes(b"x" * 4_000_000)
    found = plan.look(workspace, size="64GB", flops=1e10)
    plan.show(found)
    plan.refuse(found)
    shown = capsys.readouterr().out
    for name in ("base", "finetune", "reward", "ppo", "evaluate"):
        assert f"\n{name}: " in shown
    base = found["stages"][0]
    assert base["text"]["there"] == 1_000_000
    assert base["text"]["wanted"] == 20 * base["parameters"]
    assert base["hours"] == pytest.approx(base["steps"] * base["flops_a_step"] / 1e10 / 3600)
    assert "% of that" in shown
    assert "which `prepare` has not made yet" in shown
    for part in ("weights", "gradients", "optimizer", "KV cache"):
        assert part in shown


def test_presets_and_settings_are_tried_and_not_written(workspace: Path) -> None:
    (workspace / "presets").mkdir()
    (workspace / "presets" / "wide.yaml").write_text("base: {architecture: {d_model: 512, layers: 6}}\n")
    before = (workspace / "params.yaml").read_bytes()
    (usual,) = plan.look(workspace, ["finetune"], "1.5GB", 1e10)["stages"]
    tried = plan.look(
        workspace, ["finetune"], "1.5GB", 1e10, presets=["wide"], settings=["finetune.method=full"]
    )
    assert tried["stages"][0]["trained"] > 10 * usual["parameters"]
    with pytest.raises(
        GateRefused, match=r"lifecycle run --preset wide --set finetune\.method=full --set finetune"
    ):
        plan.refuse(tried)
    with pytest.raises(ParamsError, match="--preset wid: no such preset; did you mean wide"):
        plan.look(workspace, presets=["wid"])
    assert (workspace / "params.yaml").read_bytes() == before


def test_a_gpu_of_which_all_is_told_need_not_be_here(workspace: Path) -> None:
    settings = ["finetune.method=qlora", "base.architecture.d_model=512"]
    here = plan.look(workspace, ["finetune"], "24GB", 1e10, settings=settings)
    there = plan.look(workspace, ["finetune"], "24GB", 1e14, settings=[*settings, "compute.device=cuda"])
    assert (here["precision"], there["precision"]) == ("fp32", "bf16")
    (on_cpu,), (on_gpu,) = here["stages"], there["stages"]
    assert "mapped file" in on_cpu["bytes"]
    assert "mapped file" not in on_gpu["bytes"]
    assert on_gpu["bytes"]["activations"] < 0.6 * on_cpu["bytes"]["activations"]


def test_another_engine_has_its_share_of_a_gpu(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = "ppo.rollouts.engine={python: /bin/python, memory: 0.75}"
    gpu = ["base.architecture.family=llama", "compute.device=cuda"]
    arguments = (workspace, ["finetune", "ppo"], "3GB", 1e14)
    finetune, ppo = plan.look(*arguments, settings=[*gpu, engine])["stages"]
    assert finetune["room"] == 3e9 and finetune["fits"]
    assert ppo["room"] == 0.75e9
    (alone,) = plan.look(workspace, ["ppo"], "3GB", 1e14, settings=gpu)["stages"]
    assert alone["bytes_total"] == ppo["bytes_total"] and alone["fits"]
    crowded = plan.look(*arguments, settings=[*gpu, engine])
    plan.show(crowded)
    assert "vLLM has 2.2 GB of the memory" in capsys.readouterr().out
    with pytest.raises(GateRefused, match=r"^ppo does not fit: it needs .* and there are 750 MB; "):
        plan.refuse(crowded)
    (here,) = plan.look(workspace, ["ppo"], "3GB", 1e10, settings=[*gpu[:1], engine])["stages"]
    assert here["room"] == 3e9, "on a CPU it has none of the stage's memory set apart"
    (seq2seq,) = plan.look(
        workspace, ["evaluate"], "3GB", 1e14, settings=[gpu[1], engine.replace("ppo.rollouts", "evaluate")]
    )["stages"]
    assert seq2seq["room"] == 3e9, "it does not answer for T5"


def test_devices_divide_time_and_what_the_strategy_divides(workspace: Path) -> None:
    change(workspace, settings=["finetune.method=full"])
    (alone,) = plan.look(workspace, ["finetune"], "64GB", 1e10)["stages"]
    (eight,) = plan.look(workspace, ["finetune"], "64GB", 1e10, 8, "zero2")["stages"]
    assert eight["seconds_a_step"] == pytest.approx(alone["seconds_a_step"] / 8)
    for part, divided in (("weights", 1), ("gradients", 8), ("optimizer", 8)):
        assert eight["bytes"][part] == pytest.approx(alone["bytes"][part] / divided, abs=1)
    assert eight["bytes"]["activations"] == pytest.approx(alone["bytes"]["activations"] / 8, rel=1e-6)
    asked = ["compute.processes=8", "compute.accelerate=zero2"]
    (same,) = plan.look(workspace, ["finetune"], "64GB", 1e10, settings=asked)["stages"]
    assert same == eight


@pytest.mark.parametrize(
    ("text", "expected"), [("16GB", 16e9), ("24 GiB", 24 * 2**30), ("500mb", 5e8), ("1000", 1000)]
)
def test_sizes(text: str, expected: float) -> None:
    assert plan.bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "many"])
def test_wrong_sizes_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="expected a size such as 16GB"):
        plan.bytes_of(text)


def test_a_stage_without_a_plan_is_named(workspace: Path) -> None:
    with pytest.raises(UserError, match="--stage prune: no plan for it; there are plans for base, finetune"):
        plan.look(workspace, ["prune"], "1GB", 1e9)


def test_a_run_that_clearly_cannot_fit_is_refused_before_it_starts(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Ram(2e9))
    change(workspace, settings=["finetune.method=full"])
    plan.refuse_what_cannot_fit(workspace, ["finetune", "ppo", "prune"])
    change(workspace, settings=["base.architecture.d_model=1024", "base.architecture.layers=12"])
    with pytest.raises(ParamsError, match=r"finetune cannot fit: .* --set finetune\.method=lora") as refused:
        plan.refuse_what_cannot_fit(workspace, ["finetune"])
    assert exit_code(refused.value) == 2
    plan.refuse_what_cannot_fit(workspace, ["prepare", "feedback"])
    change(workspace, settings=["base.source=google/flan-t5-xxl"])  # not asked of the hub
    plan.refuse_what_cannot_fit(workspace, ["finetune"])


def test_a_gpu_that_is_not_asked_is_not_judged(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Ram(1e6))
    with pytest.raises(ParamsError):
        plan.refuse_what_cannot_fit(workspace, ["finetune"])
    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    change(workspace, settings=["compute.device=auto"])
    plan.refuse_what_cannot_fit(workspace, ["finetune"])


def test_the_check_before_a_run_imports_no_torch(workspace: Path) -> None:
    code = (
        "import sys, pathlib; from flows.plan import refuse_what_cannot_fit as check; "
        "check(pathlib.Path(), ['base', 'finetune', 'reward', 'ppo', 'evaluate']); "
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_does_not_fit_at_all_is_said(workspace: Path) -> None:
    found = plan.look(workspace, ["evaluate"], "10MB", 1e10)
    with pytest.raises(GateRefused, match="no change of the params would make it fit"):
        plan.refuse(found)


def test_wrong_params_are_told_first(workspace: Path) -> None:
    data: dict[str, Any] = yaml.safe_load((workspace / "params.yaml").read_text())
    data["finetune"]["method"] = "loro"
    (workspace / "params.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ParamsError, match="did you mean lora"):
        plan.look(workspace, ["finetune"], "1GB", 1e9)
