"""How long versions take to answer, measured side by side on this machine.

Speeds recorded when a version was made are of another day, load or machine. So a version and the champion are
timed when one is to replace the other: both loaded, the same prompts to each in turn, one at a time.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from tasks.metrics.bootstrap import Array, Interval, Measure, interval, mean, ratio, resamples
from tasks.stage import UserError

TIMING = Path(__file__).with_name("timing.py")


def seconds(models: Sequence[Path], prompts: Sequence[str], repeats: int) -> Array:
    """Seconds an answer of each of V models to each of N prompts, the median of the `repeats`: `[V, N]`.

    `models` are folders as MLflow stores them. Raises UserError when one cannot be loaded or does not answer.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_answering(model)) for model in models]
        for process in processes:
            _ask(process, prompts[0])  # the first answer pays for what later ones find ready
        taken = [
            [[_ask(process, prompt) for process in processes] for prompt in prompts] for _ in range(repeats)
        ]
    found: Array = np.median(np.array(taken), axis=0).T
    return found


def mean_seconds(taken: Array, samples: int, seed: int) -> Interval:
    """The mean of `taken` `[N]` with its 95 % bootstrap interval over prompts."""
    return interval(mean(taken), resamples(len(taken), samples, seed))


def ratio_of_seconds(ours: Array, theirs: Array, samples: int, seed: int) -> Interval:
    """Our seconds over theirs, both `[N]` for the same prompts, with the paired 95 % bootstrap interval."""
    both = Measure(np.stack([ours, theirs], axis=1), ratio)
    return interval(both, resamples(len(ours), samples, seed))


@contextmanager
def _answering(model: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-P", str(TIMING), str(model)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=model, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            _line(process)
            yield process
        finally:
            process.kill()


def _ask(process: "subprocess.Popen[str]", prompt: str) -> float:
    assert process.stdin is not None
    process.stdin.write(json.dumps(prompt) + "\n")
    process.stdin.flush()
    return float(_line(process))


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise UserError("a stored version cannot be loaded, or answers no more: `lifecycle serve` shows why")
    return line
