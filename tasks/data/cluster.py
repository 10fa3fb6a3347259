"""Ray: a function of each of many items, computed on many machines, the results in the order of the items.

What an item becomes depends on the item alone, so it changes nothing where it is worked on, and what a machine
had when it was lost is worked on again elsewhere. Each machine needs the Python and the libraries that are
installed here; the code of this package is sent along. Left out: the loss of the machine this process runs on.
"""

import os
import re
import signal
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tasks.stage.errors import TryAgain, UserError, one_line

ADDRESSES = "local, auto, HOST:PORT or ray://HOST:PORT"
CODE = Path(__file__).parents[1]
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
SECONDS_TO_ANSWER = 5.0
WAITING = 4  # items for each place to work at, so that none is idle and memory is bounded
RETRIES = 10  # of an item whose machine was lost

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_address(text: str) -> bool:
    """Whether `text` is one of ADDRESSES."""
    return re.fullmatch(r"local|auto|(ray://)?[^\s/:]+:\d{1,5}", text) is not None


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be connected to a Ray cluster while the block runs.

    `local` is one of this machine's own, for as long as the block; `auto` the one that runs here already.
    Raises UserError when Ray is not installed or not the cluster's version, TryAgain when nobody answers.
    """
    if not is_address(address):
        raise UserError(f"{address} is no address of a Ray cluster: expected {ADDRESSES}")
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError(
            f"a Ray cluster ({address}) needs Ray, which is not installed: pip install '.[ray]'"
        ) from None
    _knock(address)
    os.environ.update(QUIET)
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"py_modules": [str(CODE)], "excludes": ["__pycache__"], "env_vars": QUIET},
            **options,
        )
    except ConnectionError as error:
        raise _absent(address, one_line(error)) from None
    except RuntimeError as error:
        raise UserError(f"cannot work on the Ray cluster at {address}: {one_line(error)}") from None
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own there
    try:
        yield
    finally:
        ray.shutdown()


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], cpus: float = 1, gpus: float = 0
) -> Generator[Result]:
    """`function` of each item, in order, each with so many CPUs and GPUs of the cluster that was joined.

    Items are taken as results are asked for, some ahead. An exception of `function` is raised here. Raises
    TryAgain when the cluster fails, or loses the same item over and over.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=0)(_call)

    def result(reference: Any) -> Result:
        try:
            found: Result = ray.get(reference)
        except RayTaskError as error:
            raise error.cause from error
        except (RayError, ConnectionError) as error:
            raise TryAgain(f"the Ray cluster failed: {one_line(error)}") from error
        return found

    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(remote.remote(function, item))
        if len(waiting) >= WAITING * _places(cpus, gpus):
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


def _places(cpus: float, gpus: float) -> int:
    """At how many items the cluster can work now, and at least 1: machines may be yet to come."""
    import ray

    there = ray.cluster_resources()
    by_cpus = there.get("CPU", 0) // cpus
    return max(1, int(min(by_cpus, there.get("GPU", 0) // gpus) if gpus else by_cpus))


def _knock(address: str) -> None:
    """Raise TryAgain when nobody listens at `address`: Ray tries for a minute, then ends the process."""
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise _absent(address, error.strerror or one_line(error)) from None


def _absent(address: str, reason: str) -> TryAgain:
    return TryAgain(
        f"no Ray cluster answers at {address} ({reason}): start one with `ray start --head`, or name another"
    )
