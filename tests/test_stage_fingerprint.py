"""The fingerprint moves with what a stage depends on, and with nothing else."""

from pathlib import Path

import pytest

from tasks.stage import DataError, UserError
from tasks.stage.fingerprint import fingerprint

GRAPH = """\
stages:
  toy:
    cmd: python -m toy
    deps:
      - code
      - data.txt
    params: [seed, toy]
    outs: [out]
"""
PARAMS = "seed: 1\ncompute: {threads: 1}\ntoy: {rate: 0.1}\nother: {rate: 1}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "code" / "inner").mkdir(parents=True)
    (tmp_path / "code" / "inner" / "a.py").write_text("a", encoding="utf-8")
    (tmp_path / "data.txt").write_text("data", encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(GRAPH, encoding="utf-8")
    (tmp_path / "params.yaml").write_text(PARAMS, encoding="utf-8")
    return tmp_path


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("dvc.yaml", "python -m toy", "python -m toy --fast"),
        ("code/inner/a.py", "a", "b"),
        ("data.txt", "data", "date"),
        ("params.yaml", "seed: 1", "seed: 2"),
        ("params.yaml", "rate: 0.1", "rate: 0.2"),
    ],
)
def test_it_moves_with_command_dependencies_and_params(root: Path, file: str, old: str, new: str) -> None:
    before = fingerprint("toy", root)
    replace(root / file, old, new)
    assert fingerprint("toy", root) != before
    replace(root / file, new, old)
    assert fingerprint("toy", root) == before


def test_a_renamed_file_in_a_folder_moves_it(root: Path) -> None:
    before = fingerprint("toy", root)
    (root / "code/inner/a.py").rename(root / "code/inner/b.py")
    assert fingerprint("toy", root) != before


def test_it_stays_with_everything_else(root: Path) -> None:
    before = fingerprint("toy", root)
    replace(root / "params.yaml", "other: {rate: 1}", "other: {rate: 2}")
    replace(root / "params.yaml", "threads: 1", "threads: 2")  # not among this stage's params
    replace(root / "dvc.yaml", "outs: [out]", "outs: [out]\n    desc: words\n    meta: {gpu: true}")
    (root / "code" / "__pycache__").mkdir()
    (root / "code" / "__pycache__" / "a.pyc").touch()
    assert fingerprint("toy", root) == before


def test_options_of_a_dependency_are_no_part_of_its_path(root: Path) -> None:
    before = fingerprint("toy", root)
    replace(root / "dvc.yaml", "- data.txt", "- data.txt: {hash: md5}")
    assert fingerprint("toy", root) == before


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(UserError, match=r"dvc.yaml: no stage tyo; it has toy"):
        fingerprint("tyo", root)
    (root / "data.txt").unlink()
    with pytest.raises(DataError, match=r"data.txt is missing: run the stage that makes it"):
        fingerprint("toy", root)
