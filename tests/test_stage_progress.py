"""The bar: a line now and then where nobody watches, a drawn bar on a terminal, a file for the runner."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from flows.display import progress_text
from tasks.stage import progress as module
from tasks.stage.progress import Bar, progress


def test_lines_come_at_most_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress(40, "training") as bar:
        for _ in range(20):
            now += 1
            bar.advance(loss=0.25)
    assert capsys.readouterr().err.splitlines() == [
        "training: 10/40, 30 s left loss=0.25",
        "training: 20/40, 20 s left loss=0.25",
    ]


def test_without_a_known_end_the_count_is_shown() -> None:
    bar = Bar(None, "reading", None)
    bar.advance(3, rejects=1)
    assert bar.line(1.0) == "reading: 3 rejects=1"
    assert Bar(5, "reading", None).line(1.0) == "reading: 0/5"


def test_what_an_earlier_run_has_done_takes_no_time(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    with progress(100, "training", file) as bar:
        bar.resume(60)
        assert bar.line(1.0) == "training: 60/100"
        bar.advance(10)
        assert bar.line(20.0) == "training: 70/100, 60 s left"
    told = json.loads(file.read_text(encoding="utf-8")) | {"seconds": 20.0}
    assert progress_text(told) == "training 70/100 left=60s"


def test_the_file_says_how_far_it_is_also_after_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    with pytest.raises(RuntimeError), progress(4, "training", file) as bar:
        bar.advance(3, loss=0.5)
        raise RuntimeError
    state = json.loads(file.read_text(encoding="utf-8"))
    assert (state["description"], state["done"], state["total"]) == ("training", 3, 4)
    assert state["figures"] == {"loss": 0.5}
    assert state["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_the_file_is_not_written_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(Bar, "_write", lambda bar, _file: written.append(bar.done))
    with progress(1000, "training", tmp_path / "progress.json") as bar:
        for _ in range(1000):
            bar.advance()
    assert len(written) < 100
    assert written[-1] == 1000


def test_a_terminal_sees_a_bar() -> None:
    ours, theirs = pty.openpty()
    script = "from tasks.stage.progress import progress\nwith progress(2, 'x') as bar: bar.advance(2, loss=0.5)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1000):
            shown += part
    except OSError:  # how Linux reports the other end of a terminal closed
        pass
    os.close(ours)
    assert process.wait() == 0
    assert b"2/2" in shown
    assert b"loss=0.5" in shown
