"""The command line: help, exit codes, one line for each fault, JSON for scripts, and the UIs."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from toy import Toy, build

from flows import display, server
from flows.report import variant_rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    toy = build(tmp_path_factory.mktemp("toy") / "toy", {"a": [], "b": ["a"]})
    toy.dvc("repro", "a")
    return toy


@pytest.fixture(autouse=True)
def no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


COMMANDS = [[], *([name] for name in (
    "run", "plan", "sweep", "apply", "compare", "status", "report", "chat", "score", "label", "verify",
    "upload", "ui", "register", "promote", "lineage", "reproduce", "endpoint", "serve",
))]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_comes_at_once(command: list[str], toy: Toy) -> None:
    """It imports the command line alone: a few hundred modules, where torch or prefect bring thousands."""
    done = toy.lifecycle(*command, "--help", PYTHONPROFILEIMPORTTIME="1")
    assert 0 < done.stderr.count("import time:") < 400
    assert ("Example" if command else "Exit codes") in done.stdout


def test_status_says_why(toy: Toy) -> None:
    entries = {
        entry["stage"]: entry for entry in json.loads(toy.lifecycle("status", "--json").stdout)["stages"]
    }
    assert (entries["a"]["state"], entries["a"]["why"]) == ("up to date", [])
    assert (entries["b"]["state"], entries["b"]["why"]) == ("never run", ["never run"])
    assert entries["a"]["outputs"] == {out["path"]: out["md5"] for out in toy.lock()["stages"]["a"]["outs"]}
    assert entries["a"]["last_exit_code"] == 0

    changed = toy.lifecycle("run", "--set", "a.text=other", "--stage", "nowhere", code=2)
    assert changed.stderr.splitlines() == [
        "params.yaml: a.text: a → other",
        "--stage nowhere: no such stage in dvc.yaml; it has a, b",
    ]
    entries = {
        entry["stage"]: entry for entry in json.loads(toy.lifecycle("status", "--json").stdout)["stages"]
    }
    assert (entries["a"]["state"], entries["a"]["why"]) == ("changed", ['param a.text "a" → "other"'])
    assert "a.text" in toy.lifecycle("status").stdout
    toy.set("a", text="a")


def test_status_is_watched_until_ctrl_c(toy: Toy, tmp_path: Path) -> None:
    watched = toy.copy(tmp_path / "toy")
    command = watched.start("status", "--watch", "--json")
    assert command.stdout is not None

    def states() -> list[str]:
        assert command.stdout is not None
        return [entry["state"] for entry in json.loads(command.stdout.readline())["stages"]]

    assert states() == ["up to date", "never run"]
    watched.set("a", text="other")
    assert states() == ["changed", "never run"]
    watched.set("a", text="a")
    assert states() == ["up to date", "never run"]
    os.kill(command.pid, signal.SIGINT)
    assert command.communicate(timeout=30)[0] == ""
    assert command.returncode == 0
    refused = toy.lifecycle("status", "--watch", code=2)
    assert refused.stderr == "--watch is for a terminal; with --json it writes a line for each change\n"


def test_status_is_watched_in_a_terminal(toy: Toy) -> None:
    terminal, end = os.openpty()
    command = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "status", "--watch"], cwd=toy.root, stdout=end, stderr=end,
        env={**toy.environment({}), "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(end)
    seen = ""
    while "never run" not in seen.partition("b  ")[2]:
        seen += os.read(terminal, 4096).decode()
    assert "up to date" in seen
    os.kill(command.pid, signal.SIGINT)
    assert command.wait(timeout=30) == 0
    os.close(terminal)


def test_up_to_date_stages_print_the_result_table(toy: Toy) -> None:
    done = toy.lifecycle("run", "--stage", "a", "--json")
    result = json.loads(done.stdout)
    assert (result["exit_code"], result["title"]) == (0, "nothing to do")
    assert [entry["state"] for entry in result["stages"]] == ["cached"]
    assert "length=0 words=0" in toy.lifecycle("run", "--stage", "a").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--set", "a.txt=1"], "--set a.txt=1: a.txt: no such key; did you mean a.text?"),
        (["run", "--set", "a.outcome=god"], 'params.yaml: a.outcome: found "god", expected one of '),
        (["run", "--preset", "none"], "--preset none: no such preset; there are: none"),
    ],
)
def test_wrong_params_are_told_in_one_line(arguments: list[str], message: str, toy: Toy) -> None:
    before = (toy.root / "params.yaml").read_text()
    done = toy.lifecycle(*arguments, code=2)
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert (toy.root / "params.yaml").read_text() == before


def test_a_params_file_that_was_edited_wrongly_starts_nothing(toy: Toy, tmp_path: Path) -> None:
    broken = toy.copy(tmp_path / "toy")
    broken.set("b", extra=1)
    broken.forget_starts()
    done = broken.lifecycle("run", code=2)
    assert done.stderr.startswith("params.yaml: b.extra: unknown key")
    (broken.root / "params.yaml").write_text("a: [1\n")
    done = broken.lifecycle("run", code=2)
    assert done.stderr.startswith("params.yaml")
    assert done.stderr.count("\n") == 1
    assert broken.starts() == []


def test_outside_a_repository(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "status"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"no dvc.yaml with a .dvc folder in {tmp_path} or above: run this inside the repository\n"
    )


def test_inside_a_folder_of_the_repository(toy: Toy) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "status", "--json"], cwd=toy.root / "tasks", capture_output=True,
        text=True, check=True, env={**toy.environment({}), "PYTHONPATH": str(toy.root)},
    )  # fmt: skip
    assert [entry["stage"] for entry in json.loads(done.stdout)["stages"]] == ["a", "b"]


def test_upload_has_nothing_to_send(toy: Toy) -> None:
    assert json.loads(toy.lifecycle("upload", "--json").stdout) == {"sent": [], "kept": [], "problem": None}


def test_both_uis_come_up_and_end_together(
    toy: Toy, tmp_path: Path, mlflow_store: str, prefect_template: Path
) -> None:
    shutil.copytree(prefect_template, tmp_path, dirs_exist_ok=True)
    ports = [server.free_port(), server.free_port()]
    options = ("--mlflow-port", str(ports[0]), "--prefect-port", str(ports[1]))
    command = toy.start("ui", *options)
    assert command.stdout is not None
    lines = []
    while not lines or "Ctrl-C" not in lines[-1]:
        lines.append(command.stdout.readline())
        assert lines[-1], lines
    children = psutil.Process(command.pid).children(recursive=True)
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
            assert page.status == 200
    assert server.configured(toy.root) == f"http://127.0.0.1:{ports[1]}/api", (
        "a run beside it is recorded there"
    )
    taken = toy.lifecycle("ui", *options, code=2)
    assert taken.stderr == f"port {ports[0]} is in use: choose another with --mlflow-port\n"
    os.kill(command.pid, signal.SIGINT)
    command.communicate(timeout=30)
    assert command.returncode == 0
    _, alive = psutil.wait_procs(children, timeout=5)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    assert server.configured(toy.root) is None


def test_the_server_of_a_profile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.configured(tmp_path) is None
    profiles = 'active = "team"\n[profiles.team]\nPREFECT_API_URL = "http://prefect.example/api"\n'
    (tmp_path / "profiles.toml").write_text(profiles)
    assert server.configured(tmp_path) == "http://prefect.example/api"
    monkeypatch.setenv("PREFECT_API_URL", "http://other.example/api")
    assert server.configured(tmp_path) == "http://other.example/api"


def test_the_table_of_variants_has_baselines_last_and_nothing_else() -> None:
    scores = {"rougeL": 0.6, "slot_f1": 1}
    evaluation = {
        "about": {"examples": 400, "task": "summarize"},
        "base": {"rougeL": 0.1234567, "slot_f1": 0.5, "rougeL_low": 0.1},
        "baselines": {"lead_1": {"rougeL": 0.25}},
        "decoding": {"greedy": scores},
        "differences": {"base": scores},
        "finetune": scores,
        "splits": {"finetune": {"seen": scores}},
        "tasks": {"finetune": {"act": scores}},
    }
    assert variant_rows(evaluation) == [
        {"variant": "base", "ROUGE-L": "0.123", "slot-F1": "0.500"},
        {"variant": "finetune", "ROUGE-L": "0.600", "slot-F1": "1.000"},
        {"variant": "lead_1", "ROUGE-L": "0.250", "slot-F1": ""},
    ]
    assert variant_rows({}) == []


def test_the_table_of_variants_fits_a_terminal() -> None:
    names = ("rougeL", "bleu", "exact_match", "slot_f1", "perplexity", "toxicity_rate", "length_ratio")
    [row] = variant_rows({"nearest_summary": dict.fromkeys(names, 1234.5)})
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(display.variants_table([row]))
    assert console.export_text().splitlines()[0].split() == list(row)


def test_the_dvc_settings_of_this_repository(repository: Path) -> None:
    """No telemetry, a private cache for what DVC unpickles, and a remote that a fresh clone has."""
    import configparser

    config = configparser.ConfigParser()
    config.read_string((repository / ".dvc" / "config").read_text().replace("    ", ""))
    core = config["core"]
    assert (core["analytics"], core["site_cache_dir"], core["remote"]) == ("false", ".work/dvc", "storage")
    assert config["'remote \"storage\"'"]["url"] == "storage"
    assert "/storage" in (repository / ".dvc" / ".gitignore").read_text().splitlines()
