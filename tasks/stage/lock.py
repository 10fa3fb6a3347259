"""A lock that a process holds for as long as it lives, whatever ends it."""

import fcntl
import os
import time
from pathlib import Path

TRIES = 5  # `holder` takes a lock for an instant to see whether it is free
SECONDS_BETWEEN_TRIES = 0.02


class Lock:
    """An exclusive lock on `path`; the file holds the owner's process id.

    The operating system releases it when the process ends, also when children it forked live on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; when somebody has it, wait for it, or give False at once."""
        descriptor = _lock(self.path, TRIES if not wait else None)
        if descriptor is None:
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
        os.register_at_fork(after_in_child=self.release)  # a forked child shares the lock until it closes it
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def holder(path: Path) -> int | None:
    """The id of the process that holds the lock on `path`, or None."""
    if not path.exists():
        return None
    written = path.read_text(encoding="ascii").strip()
    descriptor = _lock(path, 1)
    if descriptor is None:
        return int(written) if written else None
    os.close(descriptor)
    return None


def _lock(path: Path, tries: int | None) -> int | None:
    """Open and lock a file; None when somebody else has it at each try. Without a number of tries, wait."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if tries is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor
    for left in reversed(range(tries)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if left:
                time.sleep(SECONDS_BETWEEN_TRIES)
    os.close(descriptor)
    return None
