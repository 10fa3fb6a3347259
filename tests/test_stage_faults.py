"""A training stage killed, or out of disk, in the middle of a checkpoint: it ends with the same bytes."""

import shutil
import signal
from pathlib import Path

import pytest
from faults import KILL, before, fault_in_stage
from lm_stages import Workplace, base_section, lay_out

# torch.save writes the arguments, the optimizer, the scheduler and the random state of each checkpoint
SECOND_OPTIMIZER = 6
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"  # of bytes in a file
KILL_BEFORE_SEALED = f"""
def replace(path, target, _whole=Path.replace):
    if target.parent.name == "checkpoint-8" and target.name == "manifest.json":
        {KILL}
    return _whole(path, target)
Path.replace = replace
"""
FAULTS = {
    "killed between its files": (
        -signal.SIGKILL,
        "transformers.trainer",
        before("torch.save", KILL, call=SECOND_OPTIMIZER),
    ),
    "killed before the seal has its name": (-signal.SIGKILL, "tasks.stage.files", KILL_BEFORE_SEALED),
    "out of disk between its files": (
        75,
        "transformers.trainer",
        before("torch.save", FULL_DISK, call=SECOND_OPTIMIZER),
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A run that nothing went wrong in."""
    workplace = lay_out(tmp_path_factory.mktemp("whole"))
    workplace.set(base=base_section("llama"))
    workplace.run("base")
    return workplace


@pytest.mark.parametrize("what", FAULTS)
def test_in_the_middle_of_a_checkpoint(what: str, whole: Workplace, tmp_path: Path) -> None:
    code, *harm = FAULTS[what]
    workplace = Workplace(tmp_path / "workplace")
    shutil.copytree(whole.root, workplace.root)
    for made in ("models", "reports", "metrics", ".work"):
        shutil.rmtree(workplace.root / made)
    said = workplace.run("base", code, **fault_in_stage(workplace.root, *harm))
    if code == 75:
        assert "Traceback" not in said
        assert said.count("base: the disk is full (") == 1
        assert "make room and run again" in said
    assert not (workplace.root / "models").exists()

    shutil.rmtree(workplace.root / "tasks")
    said = workplace.run("base")
    assert "checkpoint-8 is not used: it was never finished" in said
    assert workplace.outputs("base") == whole.outputs("base")
