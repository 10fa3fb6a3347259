"""An int8 model that answers faster than a dense one on a CPU, and keeps its weights in int8 in memory.

The integers of an `int8` folder go to the int8 matrix product that PyTorch has for x86 and ARM; activations
become integers as they come, of 7 bits, since 8 could overflow on older CPUs. That is a way to run a model, not
to store it: its answers are a little less exact than those of the folder opened plainly, and the prompts of a
batch share the scale of their activations.
"""

import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tasks.compress.formats import quantizable
from tasks.compress.schemes import BITS
from tasks.lm.model import LanguageModel, load
from tasks.stage import Compute, UserError


class Int8Linear(nn.Module):
    """A linear layer of int8 weights `[N, K]` with a scale for each row `[N, 1]`."""

    def __init__(self, integers: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rows = scale.flatten().double()
        with warnings.catch_warnings():  # the one way to these kernels, to be replaced in a later PyTorch
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            weight = torch._make_per_channel_quantized_tensor(
                integers, rows, torch.zeros(len(rows), dtype=torch.int64), 0
            )
        self._packed = torch.ops.quantized.linear_prepack(weight, bias)
        self.weight = None  # T5 looks for a type that its activations should have

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]`."""
        found: Tensor = torch.ops.quantized.linear_dynamic(input, self._packed, True)
        return found


def load_int8(folder: Path, compute: Compute) -> LanguageModel:
    """Open a folder that was written as `int8` to answer with int8 kernels on the CPU.

    Raises UserError when the folder holds no such model.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    lm = load(folder, compute.model_copy(update={"device": "cpu", "precision": "fp32"}))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for name, layer in quantizable(lm.model).items():
                if f"{name}.weight_packed" not in names:
                    continue
                packed, scale = (tensors.get_tensor(f"{name}.weight_{part}") for part in ("packed", "scale"))
                if scale.shape[1] != 1:
                    raise UserError(f"{folder} has groups of weights; int8 kernels want a scale for each row")
                integers = unpack_from_int32(packed, BITS["int8"], torch.Size(layer.weight.shape))
                lm.model.set_submodule(name, Int8Linear(integers, scale, layer.bias))
    if not any(isinstance(module, Int8Linear) for module in lm.model.modules()):
        raise UserError(f"{folder} holds no int8 weights; run quantize with scheme: int8")
    return lm
