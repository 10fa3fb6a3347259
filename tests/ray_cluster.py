"""A Ray cluster of two nodes on this machine's loopback, one CPU each; the second can be killed and replaced.

Ray lives in a process of its own (this file, as a program), so that the tests import nothing of it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ENVIRONMENT = {  # of nodes and of drivers
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # no address but loopback, as on these two
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # beside other tests, workers that are nice get no processor
}
DETECTION = {  # of a lost node: seconds instead of half a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}


@dataclass
class RayCluster:
    """`address` is for drivers, who need ENVIRONMENT; `second` is a raylet."""

    address: str
    second: int
    logs: Path
    _process: "subprocess.Popen[str]"

    def whole(self) -> None:
        """See to it that there are two nodes."""
        if alive(self.second):
            return
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write("add\n")
        stdin.flush()
        self.second = int(_line(self._process))

    def said(self, text: str) -> int:
        """How often the workers of all drivers have said something."""
        return sum(path.read_text().count(text) for path in self.logs.glob("worker-*.err"))


@contextmanager
def started() -> Iterator[RayCluster]:
    """Two nodes for the time of the block."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # paths of sockets must be short
    (folder / "ray").mkdir()  # the node leaves its address there before it makes the folder
    try:
        with subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            found = json.loads(_line(process))
            try:
                yield RayCluster(**found, logs=folder / "ray" / "session_latest" / "logs", _process=process)
            finally:
                assert process.stdin is not None
                process.stdin.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether a raylet still runs."""
    try:
        return "raylet" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def _line(process: "subprocess.Popen[str]") -> str:
    output: IO[str] | None = process.stdout
    assert output is not None
    line = output.readline()
    assert line, "the cluster has ended"
    return line


def _serve() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(
        num_cpus=1,
        include_dashboard=False,
        _system_config=DETECTION,
    )

    def second() -> int:
        return int(cluster.add_node(num_cpus=1).all_processes["raylet"][0].process.pid)

    print(json.dumps({"address": cluster.address, "second": second()}), flush=True)
    for _ in sys.stdin:
        print(second(), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _serve()
