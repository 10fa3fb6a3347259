"""How `prepare` grows with its input: rows per second and peak memory at 10k, 100k and 1M rows.

    python benchmarks/prepare_scale.py [ROWS ...]

Each size runs as the real command in a temporary folder, on JSON lines of about 110 words a row, 5 % of them
exact and 5 % near repeats. Memory is the sum over all processes of what is theirs alone (USS), looked at ten
times a second; the sum of RSS, which counts shared pages and mapped files too, is written down beside it.
"""

import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

RESULT = Path(__file__).parent / "results" / "prepare_scale.json"
SIZES = (10_000, 100_000, 1_000_000)
VOCABULARY = tuple(f"word{number}" for number in range(20_000))
SECTION = {
    "examples": [
        {
            "kind": "file",
            "name": "scale",
            "paths": ["rows.jsonl"],
            "format": "jsonl",
            "task": "summarize",
            "columns": {"id": "name", "input": "dialogue"},
            "outputs": ["summary"],
            "split": None,
            "weight": None,
        }
    ],
    "templates": {"summarize": ["Sum up:\n{input}", "{input}\n\nIn short:"]},
    "on_error": "fail",
    "max_rejected_share": 0.0,
    "max_field_chars": 100_000,
    "deduplicate": {"exact": True, "near": 0.8},
    "splits": {"validation": 0.05, "test": 0.05},
    "leakage": 0.8,
    "text": {"sources": [], "validation": 0.0, "deduplicate": {"exact": True, "near": None}},
    "ray": None,
}


def write_rows(path: Path, count: int) -> None:
    """Rows of random words; every tenth is an exact or a near repeat of an earlier one."""
    draw = random.Random(count)
    with path.open("w", encoding="utf-8") as file:
        words: list[str] = []
        for number in range(count):
            if number % 20 == 10:
                words[draw.randrange(len(words))] = "changed"
            elif number % 20 != 0 or not words:
                words = draw.choices(VOCABULARY, k=draw.randint(70, 150))
            row = {"name": f"row{number}", "dialogue": " ".join(words), "summary": " ".join(words[:15])}
            file.write(json.dumps(row) + "\n")


def memory(process: psutil.Process) -> tuple[int, int]:
    """(USS, RSS) in bytes of a process and all its descendants."""
    uss = rss = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            info = one.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        uss, rss = uss + info.uss, rss + info.rss
    return uss, rss


def cpu_seconds() -> float:
    """Processor time of all children that have ended; unlike the clock it does not count the work of others."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(count: int) -> dict[str, Any]:
    """One run of the stage on `count` rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", count)
        compute = {"device": "cpu", "precision": "fp32", "threads": None, "processes": 1, "accelerate": None}
        params = {"seed": 0, "compute": compute, "prepare": SECTION}
        (folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")
        graph = {"stages": {"prepare": {"cmd": "python -m tasks.prepare", "params": ["seed", "prepare"]}}}
        (folder / "dvc.yaml").write_text(json.dumps(graph), encoding="utf-8")
        peak_uss = peak_rss = processes = 0
        before = cpu_seconds()
        started = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "tasks.prepare"],
            cwd=folder,
            env={**os.environ, "LIFECYCLE_TRACKING": "off"},
            stderr=subprocess.DEVNULL,
        ) as command:
            watched = psutil.Process(command.pid)
            while command.poll() is None:
                try:
                    uss, rss = memory(watched)
                    processes = max(processes, 1 + len(watched.children(recursive=True)))
                except psutil.NoSuchProcess:
                    continue
                peak_uss, peak_rss = max(peak_uss, uss), max(peak_rss, rss)
                time.sleep(0.1)
        seconds = time.perf_counter() - started
        assert command.returncode == 0, f"prepare ended with {command.returncode}"
        metrics = json.loads((folder / "metrics" / "prepare.json").read_text(encoding="utf-8"))
        return {
            "rows": count,
            "input_megabytes": round((folder / "rows.jsonl").stat().st_size / 1e6, 1),
            "seconds": round(seconds, 1),
            "rows_per_second": round(count / seconds),
            "cpu_seconds": round(cpu_seconds() - before, 1),
            "peak_megabytes": round(peak_uss / 1e6),
            "peak_rss_megabytes": round(peak_rss / 1e6),
            "processes": processes,
            "repeats": metrics["examples_repeats"],
            "near_repeats": metrics["examples_near"],
        }


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or SIZES
    results = []
    for size in sizes:
        results.append(measure(size))
        print(json.dumps(results[-1]), flush=True)
    known = json.loads(RESULT.read_text(encoding="utf-8"))["sizes"] if RESULT.exists() else []
    kept = [result for result in known if result["rows"] not in sizes]
    found = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "sizes": sorted([*kept, *results], key=lambda result: result["rows"]),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
