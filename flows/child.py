"""Run a Python tool in a process that ends with whoever started it: `python -m flows.child PID dvc status`.

A flow that is killed with SIGKILL cannot clean up behind itself. So its children watch it: when it is gone, the
whole process group is asked to end, and a stage saves its checkpoint.
"""

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence

SECONDS_BETWEEN_LOOKS = 0.5


def command(tool: str, *arguments: str) -> list[str]:
    """The command line that runs the Python tool `tool` for as long as this process lives."""
    return [sys.executable, "-m", "flows.child", str(os.getpid()), tool, *arguments]


def main(starter: int, arguments: Sequence[str]) -> None:
    """Become the Python tool `arguments[0]`, called with the other arguments."""
    threading.Thread(target=_watch, args=(starter,), name="starter", daemon=True).start()
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def _watch(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.killpg(os.getpgrp(), signal.SIGTERM)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
