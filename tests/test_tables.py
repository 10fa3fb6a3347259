"""README.md's tables come from the metrics."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def tables(folder: Path, repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "docs" / "tables.py"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_readme_agrees_with_the_numbers(repository: Path) -> None:
    found = tables(repository, repository, "--check")
    assert found.returncode == 0, found.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "base.json").write_text(
        json.dumps({"perplexity": 12.3456, "steps": 1500, "curve": [1]})
    )
    (tmp_path / "README.md").write_text("# Title\n\n<!-- table: base -->\nstale\n<!-- /table -->\n\nThe end.\n")
    return tmp_path


def test_a_stale_table_is_found_then_rewritten(folder: Path, repository: Path) -> None:
    stale = tables(folder, repository, "--check")
    assert (stale.returncode, stale.stderr.count("\n")) == (3, 1)
    assert "base" in stale.stderr

    assert tables(folder, repository).returncode == 0
    assert (folder / "README.md").read_text() == (
        "# Title\n\n<!-- table: base -->\n| Metric | Value |\n| --- | ---: |\n"
        "| perplexity | 12.35 |\n| steps | 1,500 |\n<!-- /table -->\n\nThe end.\n"
    )
    assert tables(folder, repository, "--check").returncode == 0


def test_a_changed_number_makes_the_table_stale(folder: Path, repository: Path) -> None:
    tables(folder, repository)
    (folder / "metrics" / "base.json").write_text(json.dumps({"perplexity": 99.0, "steps": 1500}))
    assert tables(folder, repository, "--check").returncode == 3


@pytest.mark.parametrize(
    ("change", "words"), [("table: evaluate", "evaluate.json"), ("table: wrong", "no table wrong")]
)
def test_a_table_without_numbers_is_one_clear_line(
    folder: Path, repository: Path, change: str, words: str
) -> None:
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("table: base", change))
    found = tables(folder, repository)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert words in found.stderr
    assert "stale" in readme.read_text()
