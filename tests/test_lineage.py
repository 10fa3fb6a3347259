"""Where a version comes from: what is recorded, what is printed, whether its commit makes the same bytes."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import Toy, build

from flows import lineage, pipeline, verify
from tasks.stage import UserError

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # DVC's pygtrie
GRAPH = {"a": [], "b": ["a"], "aside": []}


def git(root: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "toy" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *arguments], cwd=root, env={**os.environ, **names}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A committed repository whose stages have run."""
    toy = build(tmp_path_factory.mktemp("toy") / "toy", GRAPH, light=True)
    toy.dvc("repro")
    git(toy.root, "add", ".")
    git(toy.root, "commit", "--quiet", "--message", "all")
    return toy


def recorded(toy: Toy, **changes: Any) -> dict[str, Any]:
    stages = {name: stage for name, stage in pipeline.read_graph(toy.root).items() if name in ("a", "b")}
    state = {"git.commit": git(toy.root, "rev-parse", "HEAD"), "git.dirty": "false"}
    return lineage.record(toy.root, stages, state) | {
        "variant": "tuned", "stage": "b", "targets": ["b"], **changes,
    }  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `lifecycle` sets in its process is undone after the test."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))


def test_the_record_has_what_dvc_lock_has(made: Toy) -> None:
    found = recorded(made)
    entries = made.lock()["stages"]
    assert found["outputs"] == {f"data/{name}.txt": entries[name]["outs"][0]["md5"] for name in ("a", "b")}
    assert found["inputs"] == {}, "code is in the commit, and what the stages made themselves is no input"
    assert found["params"]["b"] == made.params()["b"] and found["params"]["seed"] == 1
    assert list(found["commands"]) == ["a", "b"]
    assert (found["commit"], found["dirty"]) == (git(made.root, "rev-parse", "HEAD"), False)


def test_the_lineage_prints_commit_params_hashes_and_commands(
    made: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    known = recorded(made)
    lineage.show("7", ("champion",), known)
    text = capsys.readouterr().out
    for words in (
        "version 7 (champion): tuned, made by the stage b",
        f"commit  {known['commit']}\n",
        '  b.text: "b"',
        f"  {known['outputs']['data/b.txt']}  data/b.txt",
        f"git worktree add --detach ../rebuild-7 {known['commit']}",
        ".venv/bin/lifecycle run --stage b",
        f"b: {known['commands']['b']}",
    ):
        assert words in text


def test_a_version_is_made_again_from_its_commit_alone(made: Toy, tmp_path: Path, environment: None) -> None:
    toy = made.copy(tmp_path / "toy")
    known = recorded(toy)
    (toy.root / "tasks" / "b.py").write_text("changed = True\n")  # the workspace has moved on
    toy.forget_starts()
    compared = lineage.reproduce(toy.root, "7", known, keep=False)
    assert [entry.path for entry in compared] == ["data/a.txt", "data/b.txt"]
    assert all(entry.same for entry in compared)
    assert toy.starts() == [], "it ran elsewhere"
    assert not (toy.root / ".work" / "reproduce" / "7").exists()
    assert len(git(toy.root, "worktree", "list").splitlines()) == 1


def test_a_changed_byte_is_found(
    made: Toy, tmp_path: Path, environment: None, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = made.copy(tmp_path / "toy")
    output = toy.root / "data" / "b.txt"
    output.unlink()
    output.write_text("B" + made.output("b")[1:])
    toy.dvc("commit", "--force", "b")
    known = recorded(toy)
    assert known["outputs"]["data/b.txt"] != recorded(made)["outputs"]["data/b.txt"]
    compared = lineage.reproduce(toy.root, "7", known, keep=True)
    assert {entry.path: entry.same for entry in compared} == {"data/a.txt": True, "data/b.txt": False}
    assert compared[1].found == recorded(made)["outputs"]["data/b.txt"]
    lineage.show_compared(compared)
    assert f"different  {compared[1].expected} → {compared[1].found}  data/b.txt" in capsys.readouterr().out
    kept = toy.root / ".work" / "reproduce" / "7"
    assert (kept / "data" / "b.txt").read_text() == made.output("b")


def test_what_no_commit_has_cannot_be_made_again(made: Toy) -> None:
    with pytest.raises(UserError, match="version 7 was registered with uncommitted changes"):
        lineage.reproduce(made.root, "7", recorded(made, dirty=True), keep=False)
    with pytest.raises(UserError, match=r"commit 1234567 of version 7 is not in this repository"):
        lineage.reproduce(made.root, "7", recorded(made, commit="1234567"), keep=False)


def test_the_hash_of_a_file_or_folder_is_that_of_dvc(made: Toy, tmp_path: Path) -> None:
    for path, digest in recorded(made)["outputs"].items():
        assert verify.digest_of(made.root / path) == digest
    folder = tmp_path / "repository"
    toy = build(folder, {"a": []}, light=True)
    graph = yaml.safe_load((folder / "dvc.yaml").read_text())
    graph["stages"]["a"] |= {
        "cmd": "mkdir -p data/x/y; printf b > data/x/b; printf a > data/x/y/a; printf c > data/x/y-a",
        "outs": ["data/x"],
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump(graph))
    toy.dvc("repro")
    [output] = toy.lock()["stages"]["a"]["outs"]
    assert output["md5"].endswith(".dir") and verify.digest_of(folder / "data" / "x") == output["md5"]
    assert verify.changed(folder, ["a"]) == []
    (folder / "data" / "x" / "y" / "a").unlink()
    (folder / "data" / "x" / "y" / "a").write_text("A")
    assert verify.changed(folder, ["a"]) == ["data/x"]
    assert verify.changed(folder, []) == []
    assert verify.digest_of(folder / "nothing") is None
