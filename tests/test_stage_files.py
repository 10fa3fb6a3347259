"""Atomic writes: after a crash at any moment the old content or the new one is there, whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.stage.files import new_file, new_folder, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_and_json_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "a.json"
    write_text(file, "old")
    write_json(file, {"b": 1, "a": "é"})
    assert file.read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'
    assert names(file.parent) == ["a.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_a_failed_block_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), new_file(tmp_path / "a") as file:
        file.write("new")
        raise RuntimeError
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with new_folder(tmp_path / "model") as folder:
            write_text(folder / "inner" / content, content)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model" / "inner") == ["two"]


def test_a_failed_block_leaves_the_old_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model") as folder:
        write_text(folder / "weights", "old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model") as folder:
        write_text(folder / "weights", "new")
        raise KeyboardInterrupt
    assert (tmp_path / "model" / "weights").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["model"]


KILLED_WRITER = """
import os, pathlib, signal
from tasks.stage.files import new_file, new_folder
with {call}(pathlib.Path("target")) as new:
    {write}
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("call", "write"),
    [("new_file", 'new.write("half"); new.flush()'), ("new_folder", '(new / "x").write_text("half")')],
)
def test_a_killed_writer_leaves_nothing_under_the_name_and_the_next_one_cleans_up(
    tmp_path: Path, call: str, write: str
) -> None:
    script = KILLED_WRITER.format(call=call, write=write)
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "target").exists()
    assert len(names(tmp_path)) == 1  # the leftover
    write_text(tmp_path / "target", "whole")
    assert names(tmp_path) == ["target"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a", {"old": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a", {"new": 1})
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {"old": 1}
    assert names(tmp_path) == ["a"]
