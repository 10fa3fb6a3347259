"""On a Ray cluster of two nodes: the same bytes as one process, though a node is killed in the middle."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_cluster
from classifier_toys import toy_classifier
from lm_toys import COMPUTE
from playground_toys import ROOT, lay_out
from ray_cluster import ENVIRONMENT, RayCluster

from flows import server
from flows.score import score
from tasks.data import cluster
from tasks.lm.classifier import save_classifier
from tasks.stage import TryAgain, UserError

pytest.importorskip("ray")
KILLING = """\
import os, runpy, signal, sys, time
from functools import partial

from tasks.data import cluster, sources

sources.BLOCK_BYTES = 65536
_, module, node, mark, *arguments = sys.argv
in_order = cluster.in_order


def killing(node, mark, function, item):
    result = function(item)
    if os.getppid() == node:
        open(mark, "w").close()
        for process in (node, os.getpid()):  # all that this machine was; the result is lost
            os.kill(process, signal.SIGKILL)
    while not os.path.exists(mark):
        time.sleep(0.05)
    return result


cluster.in_order = lambda function, *others: in_order(partial(killing, int(node), mark, function), *others)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
SECTION: dict[str, Any] = {
    "examples": [
        {
            "kind": "file", "name": "talks", "paths": ["talks.jsonl"], "format": "jsonl", "task": "summarize",
            "columns": {"input": "talk"}, "outputs": ["gist"], "split": None, "weight": None,
        }
    ],
    "templates": {"summarize": ["Sum up:\n{input}", "In short: {input}"]},
    "on_error": "skip",
    "max_rejected_share": 0.1,
    "max_field_chars": 1000,
    "deduplicate": {"exact": True, "near": 0.8},
    "splits": {"validation": 0.1, "test": 0.1},
    "leakage": None,
    "text": {"sources": [], "validation": 0.1, "deduplicate": {"exact": True, "near": None}},
    "ray": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[RayCluster]:
    with ray_cluster.started() as running:
        yield running


def run(folder: Path, module: str, node: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a module as a command; a task under the raylet `node` (0: none) works, then kills it and itself."""
    script = folder / "killing.py"
    script.write_text(KILLING, encoding="utf-8")
    return subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            str(script),
            module,
            str(node),
            str(folder / ".work" / "killed"),
            *arguments,
        ],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "LIFECYCLE_TRACKING": "off", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def prepare(folder: Path, address: str | None, node: int) -> dict[str, bytes]:
    """The files that the stage makes of 4000 rows, a tenth of them repeats and two bad."""
    folder.mkdir()
    rows = [
        {
            "talk": " ".join(f"{word}{number % 3600}" for word in ("red", "cold", "late", "door", "lamp") * 3),
            "gist": "x",
        }
        for number in range(4000)
    ]
    rows[1700]["gist"] = rows[3999]["gist"] = ""
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    params = {"seed": 0, "compute": COMPUTE.model_dump(), "prepare": SECTION | {"ray": address}}
    (folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")
    (folder / "dvc.yaml").write_text(
        "stages: {prepare: {cmd: python -m tasks.prepare, params: [seed, prepare]}}"
    )
    done = run(folder, "tasks.prepare", node)
    assert done.returncode == 0, done.stderr
    made = [path for path in sorted(folder.rglob("*")) if path.is_file() and ".work" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in made if path.name != "params.yaml"}


def test_prepare_makes_the_same_bytes_though_a_node_is_killed(two_nodes: RayCluster, tmp_path: Path) -> None:
    alone = prepare(tmp_path / "alone", None, 0)
    assert len(alone["data/rejects.jsonl"].splitlines()) == 2
    assert prepare(tmp_path / "cluster", two_nodes.address, two_nodes.second) == alone
    assert not ray_cluster.alive(two_nodes.second)


def test_score_makes_the_same_bytes_though_a_node_is_killed(
    two_nodes: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_nodes.whole()
    root = lay_out(tmp_path)
    save_classifier(toy_classifier("t5", root / "unused"), root / "models" / "reward")
    rows = [{"prompt": f"Who is {'very ' * (number % 7)}late at {number}?"} for number in range(96)]
    source = root / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(root)
    score(root, "finetune", [], None, source, root / "alone", 4, None)
    opened = two_nodes.said("opening model")
    options = ("--input", "in.jsonl", "--output", "out", "--part-rows", "4", "--ray", two_nodes.address)
    done = run(root, "flows.cli", two_nodes.second, "score", "finetune", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"96 rows in {root / 'out'}\n")
    assert (root / "out").read_bytes() == (root / "alone").read_bytes()
    assert not ray_cluster.alive(two_nodes.second)
    assert two_nodes.said("opening model") - opened == 2  # once on each node, for 24 parts


# --- what cannot be


@pytest.mark.parametrize("address", ["ray", "10.0.0.1", "http://10.0.0.1:6379", "auto:x", ""])
def test_an_address_is_checked(address: str) -> None:
    with (
        pytest.raises(UserError, match="expected local, auto, HOST:PORT or ray://HOST:PORT"),
        cluster.joined(address),
    ):
        pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{server.free_port()}"
    expected = f"no Ray cluster answers at {address} .Connection refused"
    with pytest.raises(TryAgain, match=expected), cluster.joined(address):
        pass


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match=r"Ray, which is not installed: pip install '\.\[ray\]'"),
        cluster.joined("auto"),
    ):
        pass
