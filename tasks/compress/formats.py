"""A model with quantised linear layers as a folder that `AutoModel*.from_pretrained` opens.

Integers are packed: what is said about bytes is what lies on the disk. Embeddings, norms and the layer that
gives the logits stay as they are, and with bitsandbytes what transformers keeps in float32 for an architecture
(of T5 the second feed-forward layer). Packed integers become dense weights as they are opened: a CPU has no
faster way to run them as they lie (tasks/compress/kernels.py has one for int8).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.compress.quantization import fake_quantized, scales, to_integers
from tasks.compress.schemes import Scheme
from tasks.lm.device import device, precision
from tasks.lm.model import LanguageModel, attach, load_model, save
from tasks.stage import Compute, ParamsError
from tasks.stage.files import new_folder, write_json

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def quantizable(model: "PreTrainedModel") -> dict[str, nn.Linear]:
    """The linear layers by name, all but the one that gives the logits."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def check_groups(model: "PreTrainedModel", group_size: int) -> None:
    """Raises ParamsError when a linear layer's inputs do not divide into groups of `group_size`."""
    for name, layer in quantizable(model).items():
        if layer.in_features % group_size:
            raise ParamsError(
                f"quantize.group_size is {group_size}, which does not divide the {layer.in_features} inputs "
                f"of {name}; take a divisor of that"
            )


def save_integers(lm: LanguageModel, folder: Path, bits: int, group_size: int | None) -> None:
    """Write `lm` with packed integers of `bits` bits for the weights of its linear layers, all or nothing.

    One scale for each `group_size` weights, or for each row where that is None.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    state: dict[str, Tensor] = lm.model.state_dict()
    for name in quantizable(lm.model):
        weight = state.pop(f"{name}.weight")
        scale = scales(weight, bits, group_size)
        state[f"{name}.weight_packed"] = pack_to_int32(to_integers(weight, scale, bits), bits)
        state[f"{name}.weight_scale"] = scale
        state[f"{name}.weight_shape"] = torch.tensor(weight.shape)
    with new_folder(folder) as temporary:
        lm.model.save_pretrained(temporary, state_dict=state)
        lm.model.generation_config.save_pretrained(temporary)
        lm.tokenizer.save_pretrained(temporary)
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = _packed_config(lm.model, bits, group_size)
        write_json(temporary / "config.json", config)


def save_with_bitsandbytes(dense: Path, folder: Path, scheme: Scheme, compute: Compute) -> None:
    """Write the dense model in the folder `dense` as `int8_dynamic` or `nf4`, all or nothing."""
    model = load_model(
        dense,
        quantization_config=_bitsandbytes_config(scheme, compute),
        device_map={"": device(compute)},
        dtype=torch.float32,
    )
    save(attach(model, dense), folder)


@contextmanager
def fake_quantization(model: "PreTrainedModel", bits: int, group_size: int) -> Iterator[None]:
    """In the block the linear layers of `model` compute with weights that made a trip through integers."""

    class FakeQuantizedLinear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, fake_quantized(self.weight, bits, group_size), self.bias)

    layers = quantizable(model).values()
    kinds = [type(layer) for layer in layers]
    for layer in layers:
        layer.__class__ = FakeQuantizedLinear
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


def _packed_config(model: "PreTrainedModel", bits: int, group_size: int | None) -> dict[str, Any]:
    """What config.json says of packed integers, in the words of compressed-tensors."""
    head = model.get_output_embeddings()
    grouped = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": True,
        "ignore": [name for name, module in model.named_modules() if module is head],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **grouped},
            }
        },
    }


def _bitsandbytes_config(scheme: Scheme, compute: Compute) -> "BitsAndBytesConfig":
    from transformers import BitsAndBytesConfig

    if scheme == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=precision(compute),
        )
    # No outlier is kept in float (threshold 0): smoothing has taken care of them.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
