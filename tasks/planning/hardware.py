"""The machine at hand: where a stage would run, with how much memory, and how fast it multiplies."""

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tasks.stage import Compute

CONTEXT = 0.6e9  # bytes of a GPU that CUDA and its libraries take
UTILISATION = 0.4  # of a matrix product's speed, that training reaches: a rule of thumb, lower for small models
SIZE, SECONDS = 1024, 0.5  # of the matrices, and how long they are multiplied


class Machine(NamedTuple):
    """A device, its bytes of memory, the precision of activations, and operations a second once asked."""

    device: str
    memory: float
    precision: str
    flops: Callable[[], float]


def has_gpu() -> bool:
    """Whether a stage may find an accelerator here; told without torch, whose import takes seconds."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def machine(compute: Compute) -> Machine:
    """The device that `compute` asks for. Raises ParamsError when it is not there."""
    import psutil
    import torch

    from tasks.lm.device import device, precision

    where, kind = device(compute), precision(compute)
    if where.type == "cuda":
        memory = torch.cuda.get_device_properties(where).total_memory
    else:
        memory = psutil.virtual_memory().total
    return Machine(where.type, memory, "bf16" if kind == torch.bfloat16 else "fp32", lambda: _measured(compute))


def elsewhere(compute: Compute, memory: float, flops: float) -> Machine | None:
    """A GPU that `compute` asks for by name, of which all is told, so that it need not be here; else None."""
    if compute.device != "cuda":
        return None
    return Machine("cuda", memory, "fp32" if compute.precision == "fp32" else "bf16", lambda: flops)


def _measured(compute: Compute) -> float:
    """What training may reach: a share of the speed of a large matrix product."""
    import torch

    from tasks.lm.device import device, precision

    left = torch.randn(SIZE, SIZE, device=device(compute), dtype=precision(compute))
    (left @ left)[0, 0].item()  # waits for a GPU
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        (left @ left)[0, 0].item()
        products += 1
    return UTILISATION * products * 2 * SIZE**3 / (time.perf_counter() - began)
