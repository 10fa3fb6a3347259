"""Where a model runs and in which precision, from the `compute` section of params.yaml."""

import torch

from tasks.stage import Compute, ParamsError


def device(compute: Compute) -> torch.device:
    """The device asked for; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises ParamsError when the named device is not present.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if compute.device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if present[name]))
    if not present[compute.device]:
        raise ParamsError(f"compute.device is {compute.device}, but there is none here; set it to auto or cpu")
    return torch.device(compute.device)


def precision(compute: Compute) -> torch.dtype:
    """The type activations are computed in; `auto` takes bfloat16 on a CUDA device that has it."""
    if compute.precision == "auto":
        capable = device(compute).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if capable else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[compute.precision]


def allow_tf32(compute: Compute) -> None:
    """From here on a GPU multiplies float32 matrices as TF32, unless `compute` asks for fp32."""
    torch.backends.cuda.matmul.allow_tf32 = compute.precision != "fp32"
