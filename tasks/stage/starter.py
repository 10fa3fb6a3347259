"""Notices that whoever started this process is gone.

A stage runs below DVC, often with a shell between the two, so the death of the direct parent says too little.
The links of that chain are watched instead: a process whose parent dies is given another one.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.5
SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}


def links_to_starter() -> list[tuple[int, int]]:
    """(process, parent) from this process up to the first that is not a shell running a command (`sh -c`).

    A shell that a person types into does not count: with `nohup` a stage may outlive it.
    """
    import psutil

    links: list[tuple[int, int]] = []
    process = psutil.Process()
    while (parent := process.parent()) is not None:
        command = parent.cmdline()
        shell = bool(command) and Path(command[0]).name.lstrip("-") in SHELLS
        if shell and all(argument.startswith("-") for argument in command[1:]):
            break
        links.append((process.pid, parent.pid))
        if not (shell and "-c" in command):
            break
        process = parent
    return links


def intact(links: list[tuple[int, int]]) -> bool:
    """Whether every process still has the parent it had."""
    import psutil

    try:
        return all(psutil.Process(pid).ppid() == parent for pid, parent in links)
    except psutil.NoSuchProcess:
        return False


def watch(there: Callable[[], bool], when_gone: Callable[[], None], each_look: Callable[[], None]) -> None:
    """Call `each_look` every half second in a thread of its own, and `when_gone` once nobody is `there`."""

    def look() -> None:
        while there():
            each_look()
            time.sleep(SECONDS_BETWEEN_LOOKS)
        when_gone()

    threading.Thread(target=look, name="starter", daemon=True).start()
