"""`mlflow models serve` under load: requests a second, latency, nothing lost, memory that stays flat.

Registers a model folder in a store of its own under a temporary folder, serves it on a free loopback port, and
sends requests from several threads, each waiting for its answer. Every answer must be the one the model gives.
Memory is the sum of USS (what is theirs alone) over all processes of the server, looked at after each tenth of
the requests; its growth is that from the first look after a tenth, when everything is warm, to the last.

    python benchmarks/serve_load.py [--model models/ppo] [--requests 10000] [--threads 4] [--max-new-tokens 40]

Prints a table and writes benchmarks/results/serve_load.json.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from flows import server
from flows.processes import end_group
from flows.workspace import NO_TELEMETRY, child_environment
from tasks.metrics.report import markdown
from tasks.stage import Compute, UserError
from tasks.stage.files import write_json

RESULT = Path("benchmarks/results/serve_load.json")
COMPUTE = Compute(device="cpu", precision="fp32", threads=None, processes=1, accelerate=None)
SECONDS_TO_START = 300
SECONDS_TO_ANSWER = 60
LOOKS = 10
GROWTH = 0.05  # the most that memory may grow, as a share of what it was when warm


def registered(model: Path, prompts: Sequence[str], generation: dict[str, Any], folder: Path) -> str:
    """The address of the model as a version in a store under `folder`, which becomes the current one."""
    from tasks.registry import store
    from tasks.registry.register import copy_code, pack, pack_model, requirements

    limits = {"prompts": 64, "characters": 20_000, "max_new_tokens": generation["max_new_tokens"]}
    settings = {
        "generation": generation,
        "batch_size": 64,
        "max_prompt_tokens": 384,
        "limits": limits,
        "seed": 1,
        "compute": COMPUTE.model_dump(),
        "int8_kernels": False,
    }
    packed = folder / store.PACKED
    packed.mkdir()
    pack_model(model, packed / "model", "merged", COMPUTE)
    pack(packed, settings=settings, prompts=prompts, evaluation={}, lineage={}, card="")
    copy_code(folder / "tasks")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.chdir(folder)
    return store.add(
        "load",
        packed,
        folder / "tasks",
        example=[{"prompt": prompts[0]}],
        requirements=requirements(packed / "model"),
        description="",
        tags={},
        metrics={},
    ).uri


@contextmanager
def serving(uri: str, port: int, folder: Path) -> Iterator[psutil.Process]:
    """The server, answering; its output is in `folder`/server.log."""
    options = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", uri, *options],
            cwd=folder,
            env=child_environment({}),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + SECONDS_TO_START
        while not answers(port):
            if process.poll() is not None or time.monotonic() > end:
                raise UserError(f"the server did not start:\n{(folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        end_group(process, seconds=10)


def answers(port: int) -> bool:
    """Whether the server is up."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=3).close()
    except OSError:
        return False
    return True


def ask(port: int, prompt: str) -> tuple[float, str | None]:
    """Seconds to the answer, and the answer; None when none came."""
    body = json.dumps({"inputs": [{"prompt": prompt}]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
    )
    started = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as answer:
            found = json.load(answer)["predictions"][0]
    except (OSError, ValueError):
        found = None
    return time.perf_counter() - started, found


def memory(process: psutil.Process) -> int:
    """USS in bytes of the server and all its descendants."""
    return sum(each.memory_full_info().uss for each in [process, *process.children(recursive=True)])


def load_test(
    process: psutil.Process,
    port: int,
    prompts: Sequence[str],
    expected: dict[str, str],
    count: int,
    threads: int,
) -> dict[str, Any]:
    """Send `count` requests, `threads` at a time, in `LOOKS` rounds."""
    taken: list[float] = []
    lost = wrong = 0
    megabytes = []
    sent = seconds = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for look in range(LOOKS):
            rows = range(count * look // LOOKS, count * (look + 1) // LOOKS)
            asked = [prompts[row % len(prompts)] for row in rows]
            started = time.perf_counter()
            for prompt, (each, found) in zip(asked, pool.map(lambda text: ask(port, text), asked), strict=True):
                taken.append(each)
                lost += found is None
                wrong += found is not None and found != expected[prompt]
            seconds += time.perf_counter() - started
            sent += len(asked)
            megabytes.append(round(memory(process) / 1e6, 1))
            print(
                f"{sent:.0f} requests, {sent / seconds:.1f}/s, {megabytes[-1]} MB", file=sys.stderr, flush=True
            )
    ranked = sorted(taken)
    return {
        "requests": count,
        "requests_per_second": round(count / seconds, 2),
        "p50_ms": round(1000 * statistics.median(ranked), 1),
        "p95_ms": round(1000 * ranked[int(0.95 * (len(ranked) - 1))], 1),
        "p99_ms": round(1000 * ranked[int(0.99 * (len(ranked) - 1))], 1),
        "lost": lost,
        "wrong": wrong,
        "megabytes": megabytes,
        "memory_growth": round(megabytes[-1] / megabytes[0] - 1, 4),
    }


def main() -> int:
    """Serve, load, judge; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/ppo"))
    parser.add_argument("--examples", type=Path, default=Path("data/examples/test.jsonl"))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()
    from tasks.data.records import read_examples
    from tasks.lm.model import load
    from tasks.lm.respond import respond

    os.environ.update(NO_TELEMETRY)
    home = Path.cwd()
    generation = {"do_sample": False, "num_beams": 1, "max_new_tokens": options.max_new_tokens}
    folder = Path(tempfile.mkdtemp())
    try:
        examples = read_examples(options.examples, ["summarize"])[: options.prompts]
        prompts = [example.prompt for example in examples]
        lm = load(options.model, COMPUTE)
        alone = [respond(lm, [prompt], generation, batch_size=1, seed=1)[0] for prompt in prompts]
        uri, port = registered(options.model, prompts, generation, folder), server.free_port()
        with serving(uri, port, folder) as process:
            found = load_test(
                process,
                port,
                prompts,
                dict(zip(prompts, alone, strict=True)),
                options.requests,
                options.threads,
            )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        os.chdir(home)
        shutil.rmtree(folder)
    flat = found["memory_growth"] <= GROWTH
    result = {
        **found,
        "memory_growth_bar": GROWTH,
        "threads": options.threads,
        "max_new_tokens": options.max_new_tokens,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    write_json(RESULT, result)
    shown = ("requests_per_second", "p50_ms", "p95_ms", "p99_ms", "lost", "wrong", "memory_growth")
    print(markdown(shown, [[str(result[name]) for name in shown]]))
    print(f"memory is {'flat' if flat else 'not flat'} over {options.requests} requests")
    return 0 if flat and not found["lost"] and not found["wrong"] else 3


if __name__ == "__main__":
    sys.exit(main())
