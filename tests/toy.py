"""A small repository with real stages that do what their params say: the ground for the tests of the flows."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_host
import psutil
import pytest
import yaml

import tasks
from flows import pipeline
from flows.run import Run, plan

CHILD_SECONDS = 120
DVC_CONFIG = """\
[core]
    remote = storage
    analytics = false
    check_update = false
    site_cache_dir = .work/dvc
['remote "storage"']
    url = storage
"""
PACKAGE = f"__path__.append({str(Path(tasks.__file__).parent)!r})\n"
BEHAVIOUR = '''\
"""What every stage of the toy repository does."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tasks.stage import Context, GateRefused, Section, TryAgain, UserError, run_stage


class Params(Section):
    text: str
    outcome: Literal["good", "wait", "wrong data", "gate", "crash", "again once", "kill once"]


def main(name: str, inputs: Sequence[str]) -> None:
    with Path(".work/starts").open("a") as file:
        file.write(f"{name} {os.getpid()} {os.environ.get('LIFECYCLE_WARM')}\\n")
    run_stage(name, Params, lambda params, context: body(name, inputs, params, context), torch=False)


def body(name: str, inputs: Sequence[str], params: Params, context: Context) -> dict[str, Any]:
    again = Path(".work") / f"{name}.once"
    first = not again.exists()
    if params.outcome == "wrong data":
        raise UserError("row 7: output is empty; fill it in")
    if params.outcome == "gate":
        raise GateRefused("accuracy 0.4 is below 0.5")
    if params.outcome == "crash":
        raise RuntimeError("boom")
    if params.outcome == "again once" and first:
        again.touch()
        raise TryAgain("the server is busy")
    if params.outcome == "kill once" and first:
        again.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with context.progress(7, name) as bar:
        bar.advance()
        Path(f".work/{name}.begun").touch()
        while params.outcome == "wait" and not Path(".work/go").exists():
            time.sleep(0.05)
    found = "".join(Path(path).read_text() for path in inputs)
    Path("data").mkdir(exist_ok=True)
    Path(f"data/{name}.txt").write_text(f"{name}: {params.text}\\n{found}")
    return {"length": len(found), "words": len(found.split())}
'''
LIGHT = (
    "import os, sys; name, *inputs = sys.argv[1:]; os.makedirs('data', exist_ok=True); "
    "open('.work/starts', 'a').write(f'{name} {os.getpid()}\\n'); "
    "open(f'data/{name}.txt', 'w').write(name + ''.join(open(path).read() for path in inputs))"
)
STAGE = """\
from tasks.behaviour import Params, main

__all__ = ["Params"]

if __name__ == "__main__":
    main({name!r}, {inputs!r})
"""


@dataclass(frozen=True)
class Toy:
    """A repository whose stages are `graph`: name → parents."""

    root: Path
    graph: Mapping[str, Sequence[str]]

    def lifecycle(
        self, *arguments: str, code: int | None = 0, afresh: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end; `code` is the exit code it must have (None: any).

        `afresh` has it started by an interpreter of its own, as users do, and not by the host of the commands.
        """
        command = [sys.executable, "-m", "flows.cli", *arguments]
        return self.call(command, code, environment, command_host.run_plainly if afresh else command_host.run)

    def dvc(self, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return self.call([sys.executable, "-m", "dvc", *arguments], code, {})

    def call(
        self,
        command: Sequence[str],
        code: int | None,
        environment: Mapping[str, str],
        run: Callable[..., subprocess.CompletedProcess[str]] = command_host.run,
    ) -> subprocess.CompletedProcess[str]:
        done = run(command, self.root, self.environment(environment), CHILD_SECONDS)
        assert code is None or done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(
        self, *arguments: str, afresh: bool = False, **environment: str
    ) -> "command_host.Command | subprocess.Popen[str]":
        """Start the command in a session of its own and leave it running; `afresh` as in `lifecycle`."""
        command = [sys.executable, "-m", "flows.cli", *arguments]
        if command_host.THERE and not afresh:
            return command_host.start(command, self.root, self.environment(environment))
        return subprocess.Popen(
            command, cwd=self.root, env=self.environment(environment), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def settle(self, **harm: str) -> Run:
        """Bring the repository up to date in this process and without Prefect; its children get `harm` too."""
        with pytest.MonkeyPatch.context() as patch:
            site_cache = {"DVC_SITE_CACHE_DIR": str(self.root / ".work" / "dvc")}
            for name, value in self.environment(site_cache | harm).items():
                patch.setenv(name, value)
            pipeline.mend(self.root)
            run = plan(self.root)
            run.settle_rest()
            run.close()
        return run

    def environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "LIFECYCLE_TRACKING": "off", "OMP_NUM_THREADS": "1", **extra}

    def params(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.root / "params.yaml").read_text())
        return found

    def set(self, stage: str, **values: Any) -> None:
        """Change keys of a stage's section in params.yaml."""
        params = self.params()
        params[stage].update(values)
        (self.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def lock(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.root / "dvc.lock").read_text())
        return found

    def starts(self) -> list[str]:
        """The stages that were started, in order; one that was started twice is there twice."""
        path = self.root / ".work" / "starts"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def processes(self) -> list[int]:
        """The stage processes that were ever started."""
        path = self.root / ".work" / "starts"
        return [int(line.split()[1]) for line in path.read_text().splitlines()] if path.exists() else []

    def alive(self) -> list[int]:
        """Those that still run."""
        return [pid for pid in self.processes() if _runs(pid)]

    def forked_for(self) -> list[str]:
        """For which process each stage would have been forked, if it held torch."""
        return [line.split()[2] for line in (self.root / ".work" / "starts").read_text().splitlines()]

    def copy(self, root: Path) -> "Toy":
        """The same repository in another folder."""
        shutil.copytree(self.root, root, symlinks=True)
        return Toy(root, self.graph)

    def forget_starts(self) -> None:
        (self.root / ".work" / "starts").unlink(missing_ok=True)

    def go(self) -> None:
        """Let stages whose outcome is "wait" end."""
        (self.root / ".work" / "go").touch()

    def await_stage(self, stage: str) -> None:
        """Wait until the body of a stage has begun."""
        until(lambda: (self.root / ".work" / f"{stage}.begun").exists(), f"stage {stage}")

    def output(self, stage: str) -> str:
        return (self.root / "data" / f"{stage}.txt").read_text()

    def record(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / ".work" / stage / "last.json").read_text())
        return found


def build(
    root: Path, graph: Mapping[str, Sequence[str]], meta: Mapping[str, Any] | None = None, light: bool = False
) -> Toy:
    """Write a toy repository; nothing has run in it. `light` stages are plain commands that start at once."""
    (root / "tasks").mkdir(parents=True)
    (root / ".dvc").mkdir()
    (root / ".work").mkdir()
    (root / ".dvc" / "config").write_text(DVC_CONFIG)
    (root / ".dvcignore").write_text("__pycache__/\n.work/\n")
    ignored = (
        "__pycache__/",
        ".work/",
        "/data/",
        ".dvc/tmp",
        ".dvc/cache",
        ".dvc/storage",
        ".dvc/config.local",
    )
    (root / ".gitignore").write_text("".join(f"{path}\n" for path in ignored))
    (root / "tasks" / "__init__.py").write_text(PACKAGE)
    (root / "tasks" / "behaviour.py").write_text(BEHAVIOUR)
    stages = {}
    params: dict[str, Any] = {
        "seed": 1,
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1, "processes": 1, "accelerate": None},
    }
    for name, parents in graph.items():
        inputs = [f"data/{parent}.txt" for parent in parents]
        (root / "tasks" / f"{name}.py").write_text(STAGE.format(name=name, inputs=inputs))
        params[name] = {"text": name, "outcome": "good"}
        stages[name] = {
            "cmd": shlex.join(["python", "-SEc", LIGHT, name, *inputs]) if light else f"python -m tasks.{name}",
            "deps": [f"tasks/{name}.py", *inputs],
            "params": ["seed", "compute", name],
            "outs": [f"data/{name}.txt"],
            "metrics": [] if light else [{f"metrics/{name}.json": {"cache": False}}],
            "meta": {"retry_delay": 0.1, **((meta or {}).get(name, {}))},
        }
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    return Toy(root, graph)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def read_until(process: "command_host.Command | subprocess.Popen[str]", text: str) -> str:
    """What a process has printed, up to the line that has `text`; fail when it ends before."""
    assert process.stdout is not None
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until `condition` holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)
