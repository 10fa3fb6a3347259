"""Stages in two processes on a CPU: they learn as one does, one writes, and the death of one ends them all."""

import csv
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from alignment_stages import UPDATE, feedback_section, ppo_section, reward_section
from compress_stages import distill_section, with_dense
from faults import fault_in_stage
from lm_stages import SCHEDULE_HERE, Workplace, base_section, finetune_section, lay_out
from lm_toys import OPTIONS, toy
from toy import until

from tasks.lm.model import save

TOLERANCE = 1e-4
CHECKPOINT = 4  # a step after which both stages write one
SECONDS_TO_END = 30
# Each process notes its id and its steps; the one of rank VICTIM kills itself when it begins the step STEP, and
# with SLOW there is time in each step.
BEGIN = """
import os, signal, time
from pathlib import Path

def begin(step):
    with Path("begun").open("a") as file:
        file.write(f"{os.getpid()} {step}\\n")
    time.sleep(float(os.environ.get("SLOW", "0")))
    if os.environ["RANK"] == os.environ["VICTIM"] and step == int(os.environ["STEP"]):
        os.kill(os.getpid(), signal.SIGKILL)
"""
IN_TRAINING = f"""{BEGIN}
def on_step_begin(self, args, state, control, _whole=_Watch.on_step_begin, **_):
    begin(state.global_step)
    _whole(self, args, state, control)
_Watch.on_step_begin = on_step_begin
"""
IN_PPO = f"""{BEGIN}
def step(self, number, *arguments, _whole=Ppo.step):
    begin(number)
    return _whole(self, number, *arguments)
Ppo.step = step
"""
# The launcher is asked to stop when it has nothing left to do.
STOP_ON_THE_WAY_OUT = """
import atexit, os, signal

if "RANK" not in os.environ:
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)
"""
AS_ON_GPU = """
import os
import torch

def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU

if "RANK" in os.environ:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = _prepare_backend
"""


def processes(workplace: Workplace, count: int, accelerate: str | None = None) -> None:
    """Set how many there shall be."""
    file = workplace.root / "params.yaml"
    params = yaml.safe_load(file.read_text())
    params["compute"] |= {"processes": count, "accelerate": accelerate}
    file.write_text(yaml.safe_dump(params, sort_keys=False))


def numbers(file: Path) -> list[dict[str, float]]:
    with file.open() as lines:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_as_one(one: Path, two: Path, stage: str, curves: str, columns: tuple[str, ...]) -> None:
    """The curves are those of one process, and so are the weights, but for the order of sums."""
    rows, others = (numbers(root / "reports" / stage / f"{curves}.csv") for root in (one, two))
    assert len(rows) == len(others) > 4
    for row, other in zip(rows, others, strict=True):
        for column in columns:
            assert other[column] == pytest.approx(row[column], abs=TOLERANCE), (column, row["step"])
    expected, found = (weights(root / "models" / stage) for root in (one, two))
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert (tensor - found[name]).abs().max() < 1e-3, name
    assert any((tensor != found[name]).any() for name, tensor in expected.items()), "nothing was shared"


def both(
    workplace: Workplace, stage: str, accelerate: str | None = None, **extra: str
) -> tuple[Path, Path, str]:
    """Run a stage in one process, and from the same start in two; where each wrote, and what two said."""
    second = Workplace(Path(shutil.copytree(workplace.root, workplace.root.with_name("two"))))
    workplace.run(stage)
    processes(second, 2, accelerate)
    said = second.run(stage, **extra)
    return workplace.root, second.root, said


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> tuple[Path, Path, str]:
    workplace = lay_out(tmp_path_factory.mktemp("base") / "one", documents=60)
    section = base_section("t5")
    section["architecture"]["dropout"] = 0.0
    section["pretraining"]["schedule"] = {**SCHEDULE_HERE, "micro_batch_size": 2}
    workplace.set(base=section)
    store = shutil.copy(mlflow_template, workplace.root.with_name("mlflow.db"))
    return both(workplace, "base", LIFECYCLE_TRACKING="on", MLFLOW_TRACKING_URI=f"sqlite:///{store}")


@pytest.fixture(scope="module")
def ppos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    workplace = lay_out(tmp_path_factory.mktemp("ppo") / "one")
    save(toy("t5"), workplace.root / "models" / "finetune")
    separate = {"trunk": "separate", "source": None}
    update = {**UPDATE, "micro_batch_size": 3}
    workplace.set(ppo=ppo_section(value=separate, update=update, steps=5, checkpoint_every=4))
    elastic = "torch.distributed.elastic.multiprocessing.api"
    return both(workplace, "ppo", **fault_in_stage(workplace.root, elastic, STOP_ON_THE_WAY_OUT))


def test_a_base_model_learns_as_with_one(bases: tuple[Path, Path, str]) -> None:
    one, two, said = bases
    assert_as_one(one, two, "base", "train", ("loss", "learning_rate"))
    held_out = [numbers(root / "reports" / "base" / "held_out.csv")[-1]["eval_loss"] for root in (one, two)]
    assert held_out[1] == pytest.approx(held_out[0], abs=TOLERANCE)
    assert said.count("per parameter: far below") == 1


def test_one_run_is_recorded(bases: tuple[Path, Path, str]) -> None:
    from mlflow import MlflowClient

    _, two, _ = bases
    client = MlflowClient(f"sqlite:///{two.with_name('mlflow.db')}")
    [run] = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert (run.info.run_name, run.info.status) == ("base", "FINISHED")
    assert run.data.params["compute.processes"] == "2"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == [int(row["step"]) for row in numbers(two / "reports" / "base" / "train.csv")]
    assert run.data.metrics["system/peak_memory_megabytes"] > 0
    assert run.data.metrics["loss_after"] == Workplace(two).metrics("base")["loss_after"]


def test_a_reward_model_learns_as_with_one(tmp_path: Path) -> None:
    workplace = lay_out(tmp_path / "one")
    save(toy("t5"), workplace.root / "models" / "finetune")
    reward = reward_section(likelihood=1.0, language_loss=1.0, full={"learning_rate": 0.001})
    workplace.set(feedback=feedback_section(), reward=reward)
    workplace.run("feedback")
    one, two, _ = both(workplace, "reward")
    assert_as_one(one, two, "reward", "train", ("loss",))


def test_ppo_learns_as_with_one(ppos: tuple[Path, Path, str]) -> None:
    one, two, said = ppos
    assert_as_one(
        one, two, "ppo", "steps", ("reward", "kl", "policy_loss", "value_loss", "entropy", "update_kl")
    )
    assert numbers(one / "reports/ppo/held_out.csv") == [
        pytest.approx(row, abs=TOLERANCE) for row in numbers(two / "reports/ppo/held_out.csv")
    ]
    assert "Traceback" not in said, "a launcher that is told to stop on its way out has nothing to say"


def test_a_student_learns_as_with_one(tmp_path: Path) -> None:
    workplace = with_dense(tmp_path / "one", "t5")
    workplace.set(distill=distill_section(examples=48, schedule={**SCHEDULE_HERE, "log_every": 1}))
    one, two, _ = both(workplace, "distill")
    assert_as_one(one, two, "distill", "train", ("loss",))


def test_weights_in_parts_learn_as_whole_ones_and_are_saved_whole(tmp_path: Path) -> None:
    """FSDP2, whose configuration accelerate heeds on GPUs alone: here it is told that the CPU is one."""
    workplace = lay_out(tmp_path / "one", dialogues=40)
    save(toy("llama"), workplace.root / "models" / "base")
    lora = {"learning_rate": 0.02, **OPTIONS["lora"], "dropout": 0.0}
    workplace.set(finetune=finetune_section("lora", lora=lora))
    on_gpu = fault_in_stage(workplace.root, "accelerate.state", AS_ON_GPU)
    one, two, _ = both(workplace, "finetune", "fsdp2", **on_gpu)
    assert_as_one(one, two, "finetune", "train", ("loss",))


@pytest.mark.parametrize(
    ("stage", "module", "code", "victim", "step"),
    [("base", "tasks.lm.train", IN_TRAINING, 1, 6), ("ppo", "tasks.rlhf.trainer", IN_PPO, 0, 4)],
)
def test_killed_one_ends_the_stage_and_the_next_try_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, stage: str, module: str, code: str, victim: int, step: int
) -> None:
    _, root, _ = request.getfixturevalue(f"{stage}s")
    whole, harmed = Workplace(root), Workplace(Path(shutil.copytree(root, tmp_path / "harmed")))
    for made in (f"models/{stage}", "reports", "metrics", ".work"):
        shutil.rmtree(harmed.root / made)
    fault = fault_in_stage(harmed.root, module, code)
    began = time.monotonic()
    said = harmed.run(stage, 137, VICTIM=str(victim), STEP=str(step), **fault)
    assert time.monotonic() - began < SECONDS_TO_END
    line = f"process {victim} of 2 was killed by signal 9: run again, and it goes on from the last checkpoint"
    assert said.count(line) == 1
    assert "Traceback" not in said
    assert not [pid for pid, _ in begun(harmed.root) if runs(pid)]
    record = json.loads((harmed.root / ".work" / stage / "last.json").read_text())
    assert (record["exit_code"], record["message"]) == (137, line)
    assert not (harmed.root / "models" / stage).exists()

    (harmed.root / "begun").unlink()
    harmed.run(stage, VICTIM="none", STEP="0", **fault)
    assert min(step for _, step in begun(harmed.root)) == CHECKPOINT
    assert harmed.outputs(stage) == whole.outputs(stage)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=lambda end: end.name)
def test_when_the_stage_ends_its_processes_end_and_the_next_try_goes_on(
    bases: tuple[Path, Path, str], tmp_path: Path, end: signal.Signals
) -> None:
    """Asked to stop, they save a checkpoint first; killed, it leaves them to notice."""
    _, root, _ = bases
    whole, ended = Workplace(root), Workplace(Path(shutil.copytree(root, tmp_path / "ended")))
    for made in ("models/base", "reports", "metrics", ".work"):
        shutil.rmtree(ended.root / made)
    fault = fault_in_stage(ended.root, "tasks.lm.train", IN_TRAINING) | {"VICTIM": "none", "STEP": "0"}
    stage = ended.start("base", SLOW="0.4", **fault)

    def has_a_checkpoint() -> bool:
        return (ended.root / "begun").exists() and any(step > CHECKPOINT for _, step in begun(ended.root))

    until(has_a_checkpoint, "a checkpoint")
    stage.send_signal(end)
    _, said = stage.communicate(timeout=SECONDS_TO_END)
    assert stage.returncode == (-end if end == signal.SIGKILL else 128 + end), said
    assert "Traceback" not in said
    until(lambda: not [pid for pid, _ in begun(ended.root) if runs(pid)], "the end of both")
    last = max(step for _, step in begun(ended.root))
    assert not (ended.root / "models" / "base").exists()

    (ended.root / "begun").unlink()
    ended.run("base", **fault)
    first = min(step for _, step in begun(ended.root))
    assert first == CHECKPOINT if end == signal.SIGKILL else first > last
    assert ended.outputs("base") == whole.outputs("base")


def begun(root: Path) -> list[tuple[int, int]]:
    """(process, step) of every step that a process has begun."""
    return [(int(pid), int(step)) for pid, step in map(str.split, (root / "begun").read_text().splitlines())]


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
