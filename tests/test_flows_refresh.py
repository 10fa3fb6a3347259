"""Newer data and models at their source: noticed, pinned, and only what depends on them runs."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import Toy, build

from flows.refresh import refresh
from flows.run import plan
from tasks.stage.errors import TryAgain, UserError

OLD, NEW, FIXED = "a" * 40, "b" * 40, "c" * 40


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """`prepare` copies what lies under inputs, `train` reads that, `other` reads nothing."""
    toy = build(tmp_path / "toy", {"prepare": [], "train": ["prepare"], "other": []}, light=True)
    graph = yaml.safe_load((toy.root / "dvc.yaml").read_text())
    graph["stages"]["prepare"] |= {
        "cmd": "mkdir -p data && cat inputs/*.txt > data/prepare.txt", "deps": ["inputs"],
    }  # fmt: skip
    (toy.root / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    (toy.root / "inputs").mkdir()
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(toy.root / ".work" / "dvc"))
    monkeypatch.chdir(toy.root)
    return toy


def due(toy: Toy) -> set[str]:
    return plan(toy.root).due


def test_a_changed_file_and_a_changed_import_run_only_what_depends_on_them(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.txt"
    source.write_text("old\n")
    toy.dvc("import-url", str(source), "inputs/imported.txt")
    (toy.root / "inputs" / "own.txt").write_text("own\n")
    toy.dvc("repro")
    assert refresh(toy.root) == []
    assert due(toy) == set()

    (toy.root / "inputs" / "own.txt").write_text("newer\n")
    assert due(toy) == {"prepare", "train"}, "a file needs no refresh"
    (toy.root / "inputs" / "own.txt").write_text("own\n")

    source.write_text("new\n")
    assert due(toy) == set(), "nobody has looked yet"
    assert refresh(toy.root) == ["inputs/imported.txt: its source has changed"]
    assert due(toy) == {"prepare", "train"}

    assert capsys.readouterr().out == ""

    source.unlink()
    with pytest.raises(UserError, match=r"source\.txt"):
        refresh(toy.root)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A hub on this machine: path of a branch → commit, such as `datasets/team/talks/revision/main`."""
    from huggingface_hub import constants

    commits: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.removeprefix("/api/").partition("?")[0]
            self.send_response(200 if path in commits else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            answer = {"id": "/".join(path.split("/")[1:3]), "sha": commits.get(path), "siblings": []}
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield commits
        server.shutdown()


def with_hub_ids(toy: Toy) -> Path:
    """Put hub ids into the params: of a branch, of no revision, of a commit; and folders."""
    params: dict[str, Any] = toy.params()
    params["prepare"]["sources"] = [
        {"kind": "hub", "id": "team/talks", "revision": "main"},
        {"kind": "hub", "id": "team/fixed", "revision": FIXED},
    ]
    params["train"]["model"] = {"source": "team/model", "revision": None}
    params["other"]["model"] = {"source": "data/prepare.txt", "revision": None}
    path = toy.root / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


def revisions(path: Path) -> list[str | None]:
    params = yaml.safe_load(path.read_text())
    sources = [source["revision"] for source in params["prepare"]["sources"]]
    return [*sources, params["train"]["model"]["revision"], params["other"]["model"]["revision"]]


def test_a_branch_of_the_hub_is_followed_commit_by_commit(
    toy: Toy, hub: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.params_file.check_all", lambda *_: None)  # light stages have no sections
    path = with_hub_ids(toy)
    (toy.root / "inputs" / "own.txt").write_text("own\n")
    hub |= {"datasets/team/talks/revision/main": OLD, "models/team/model/revision/main": OLD}
    assert refresh(toy.root) == [f"team/talks: main → {OLD}", f"team/model: main → {OLD}"]
    assert revisions(path) == [OLD, FIXED, OLD, None]
    toy.dvc("repro")
    assert refresh(toy.root) == []
    assert due(toy) == set()

    hub["models/team/model/revision/main"] = NEW
    assert refresh(toy.root) == [f"team/model: {OLD} → {NEW}"]
    assert revisions(path) == [OLD, FIXED, NEW, None]
    assert due(toy) == {"train"}
    followed = json.loads((toy.root / "revisions.json").read_text())
    assert followed == {"datasets/team/talks": "main", "models/team/model": "main"}


def test_a_hub_that_does_not_know_the_branch_changes_nothing(toy: Toy, hub: dict[str, str]) -> None:
    path = with_hub_ids(toy)
    before = path.read_text()
    with pytest.raises(TryAgain, match="the hub does not say where main of datasets/team/talks is"):
        refresh(toy.root)
    assert path.read_text() == before
    assert not (toy.root / "revisions.json").exists()
