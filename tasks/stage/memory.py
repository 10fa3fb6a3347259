"""How much memory a process took."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Most bytes of this process that were in memory at once.

    On Linux `getrusage` would tell the peak of the process that started this one, where that is higher.
    """
    told = Path("/proc/self/status")
    if told.exists():
        lines = told.read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
