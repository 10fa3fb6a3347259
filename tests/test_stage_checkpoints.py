"""Only a checkpoint that is byte for byte what was written is resumed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import KILL, before, fault

from tasks.stage import checkpoints
from tasks.stage.files import write_text


def make(root: Path, step: int) -> Path:
    with checkpoints.save(root, step) as folder:
        write_text(folder / "weights", f"weights {step}")
        write_text(folder / "inner" / "state", f"state {step}")
    return root / f"checkpoint-{step}"


def truncate(folder: Path) -> None:
    (folder / "weights").write_bytes((folder / "weights").read_bytes()[:-1])


def flip(folder: Path) -> None:
    content = bytearray((folder / "inner" / "state").read_bytes())
    content[0] ^= 1
    (folder / "inner" / "state").write_bytes(content)


def remove(folder: Path) -> None:
    (folder / "inner" / "state").unlink()


def add(folder: Path) -> None:
    (folder / "stray").touch()


def unseal(folder: Path) -> None:
    (folder / checkpoints.MANIFEST).unlink()


def damage_manifest(folder: Path) -> None:
    file = folder / checkpoints.MANIFEST
    file.write_bytes(file.read_bytes()[:20])


def empty_manifest(folder: Path) -> None:
    (folder / checkpoints.MANIFEST).write_text("[]", encoding="utf-8")


def test_the_newest_step_is_found_by_number(tmp_path: Path) -> None:
    make(tmp_path, 9)
    newest = make(tmp_path, 10)
    assert checkpoints.newest_verified(tmp_path) == newest
    assert checkpoints.newest_verified(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "weights has changed"),
        (flip, "inner/state has changed"),
        (remove, "inner/state is missing"),
        (add, "stray was not there"),
        (unseal, "never finished"),
        (damage_manifest, "manifest.json is damaged"),
        (empty_manifest, "manifest.json is damaged"),
    ],
)
def test_a_harmed_checkpoint_is_skipped_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], reason: str
) -> None:
    whole = make(tmp_path, 1)
    harm(make(tmp_path, 2))
    assert checkpoints.newest_verified(tmp_path) == whole
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "checkpoint-2" in lines[0]
    assert reason in lines[0]


def test_a_folder_written_by_others_counts_once_it_is_sealed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-3"
    write_text(folder / "optimizer.pt", "x")
    assert checkpoints.newest_verified(tmp_path) is None
    assert "never finished" in capsys.readouterr().err
    checkpoints.seal(folder)
    assert checkpoints.newest_verified(tmp_path) == folder
    write_text(folder / "optimizer.pt", "y")
    checkpoints.seal(folder)  # written again, as a resumed trainer does
    assert checkpoints.problem(folder) is None


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), checkpoints.save(tmp_path, 1) as folder:
        write_text(folder / "weights", "half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


SAVE_TWO = """
from pathlib import Path
from tasks.stage import checkpoints
for step in (1, 2):
    with checkpoints.save(Path("work"), step) as folder:
        for name in ("weights", "optimizer"):
            (folder / name).write_text(f"{name} {step}")
"""
MOMENTS = {
    "between two of its files": ("tasks.stage.checkpoints", before("Path.write_text", KILL, call=4)),
    "before it is brought to the disk": ("tasks.stage.checkpoints", before("sync_tree", KILL, call=2)),
    "before its manifest is written": ("tasks.stage.checkpoints", before("write_json", KILL, call=2)),
    "before its manifest has its name": ("tasks.stage.files", before("Path.replace", KILL, call=2)),
    "before it has its name": ("tasks.stage.files", before("Path.rename", KILL, call=2)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_is_saved_a_checkpoint_does_not_count_and_is_saved_again(
    moment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = os.environ | fault(tmp_path, *MOMENTS[moment])
    killed = subprocess.run([sys.executable, "-c", SAVE_TWO], cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL
    work = tmp_path / "work"
    assert checkpoints.newest_verified(work) == work / "checkpoint-1"
    assert capsys.readouterr().err == ""
    assert len(list(work.iterdir())) == 2, "what the killed writer left is there, under no checkpoint's name"
    make(work, 2)
    assert checkpoints.newest_verified(work) == work / "checkpoint-2"
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_folder_is_sealed_after_a_kill_cut_its_seal_short(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    write_text(folder / "optimizer.pt", "x")
    write_text(folder / f".{checkpoints.MANIFEST}.tmp-1", "{")
    checkpoints.seal(folder)
    assert checkpoints.problem(folder) is None


def test_checkpoints_of_other_inputs_are_removed(tmp_path: Path) -> None:
    for name in ("aaaa", "bbbb"):
        make(tmp_path / name, 1)
    write_text(tmp_path / "last.json", "{}")
    checkpoints.remove_others(tmp_path / "bbbb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bbbb", "last.json"]
