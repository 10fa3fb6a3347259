"""A folder in which the stages `base` and `finetune` run as they do in the repository, on toy sizes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_toys import ARCHITECTURE, OPTIONS, SCHEDULE, texts

from tasks.data.synthetic import examples as synthetic
from tasks.stage import warm

ROOT = Path(__file__).parents[1]
# the host of all workers of this session lives as long as whoever started them
RUNNER = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
WARM = {warm.VARIABLE: str(RUNNER)}
RATES = {"full": 0.01, "lora": 0.02, "prompt_tuning": 1.0, "prefix_tuning": 2.0, "ia3": 0.1, "bitfit": 0.05}
SCHEDULE_HERE: dict[str, Any] = {**SCHEDULE, "batch_size": 8, "checkpoint_every": 4}


def base_section(family: str, **changes: Any) -> dict[str, Any]:
    return {
        "source": "scratch",
        "revision": None,
        "architecture": {**ARCHITECTURE, "family": family, "dropout": 0.1},
        "pretraining": {
            "corrupted": 0.15,
            "mean_span": 3,
            "prefix_share": 0.5,
            "learning_rate": 0.01,
            "schedule": SCHEDULE_HERE,
        },
        "max_tokens": 96,
        "held_out": 8,
        **changes,
    }


def finetune_section(method: str, **changes: Any) -> dict[str, Any]:
    options = {name: {"learning_rate": rate, **OPTIONS[name]} for name, rate in RATES.items()}
    return {
        "method": method,
        "tasks": None,
        "max_prompt_tokens": 96,
        "max_response_tokens": 32,
        "held_out": 12,
        "schedule": SCHEDULE_HERE,
        **options,
        **changes,
    }


@dataclass(frozen=True)
class Workplace:
    """A working directory with data and params.yaml."""

    root: Path

    def set(self, **sections: Any) -> None:
        """Write params.yaml (seed, compute and `sections`), and dvc.yaml with those stages."""
        shared = {
            "seed": 1,
            "compute": {"device": "cpu", "precision": "fp32", "threads": 1, "processes": 1, "accelerate": None},
        }
        (self.root / "params.yaml").write_text(yaml.safe_dump(shared | sections, sort_keys=False))
        stages = {
            name: {"cmd": f"python -m tasks.{name}", "params": ["seed", "compute", name]} for name in sections
        }
        (self.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))

    def start(self, stage: str, **extra: str) -> subprocess.Popen[str]:
        """As a run starts it, by the process of this test session that has the libraries in memory."""
        environment = {**os.environ, "LIFECYCLE_TRACKING": "off", **WARM, **extra}
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"tasks.{stage}"], cwd=self.root, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, stage: str, code: int = 0, **extra: str) -> str:
        """Run a stage to its end, which must be exit code `code`; return what it said."""
        process = self.start(stage, **extra)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code, said
        return said

    def kill_in_training(self, stage: str) -> Path:
        """Run a stage and SIGKILL it once two checkpoints are whole; return the folder of checkpoints."""
        process = self.start(stage)
        end = time.monotonic() + 100
        while len(found := sorted((self.root / ".work" / stage).glob("*/checkpoint-*/manifest.json"))) < 2:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "no checkpoint in time"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        return found[0].parents[1]

    def metrics(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "metrics" / f"{stage}.json").read_text())
        return found

    def outputs(self, stage: str) -> dict[str, bytes]:
        """The bytes of everything a stage wrote."""
        folders = [self.root / "models" / stage, self.root / "reports" / stage]
        files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        files.append(self.root / "metrics" / f"{stage}.json")
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}


def lay_out(root: Path, documents: int = 160, dialogues: int = 60) -> Workplace:
    """Data as `prepare` leaves it."""
    written = {"train": texts(documents), "validation": texts(8, seed=7)}
    for name, found in written.items():
        file = root / "data" / "text" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    rows = list(synthetic(3, dialogues))
    parts = {"train": rows[:-24], "validation": rows[-24:]}
    for name, part in parts.items():
        file = root / "data" / "examples" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(example.line() + "\n" for example in part))
    return Workplace(root)
