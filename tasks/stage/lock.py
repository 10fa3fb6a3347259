"""A lock that a process holds for as long as it lives, whatever ends it."""

import fcntl
import os
from pathlib import Path


class Lock:
    """An exclusive lock on `path`; the file holds the owner's process id.

    The operating system releases it when the process ends. Forked children do not inherit it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; when another process has it, wait for it, or give False at once."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
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
    if written == str(os.getpid()):  # opening and closing the file here would release our own lock
        return os.getpid()
    lock = Lock(path)
    if lock.acquire():
        lock.release()
        return None
    return int(written) if written else None
