"""SmoothQuant on a model: activations that are hard to quantise become easier, and nothing else changes.

A norm's output is divided, channel by channel, and the linear layers that read it are multiplied by the same
(Xiao et al. 2023, arXiv 2211.10438). Which layers read which norm is seen in a forward pass, so that no
architecture need be known.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tasks.compress.formats import quantizable
from tasks.compress.quantization import smoothing_factors
from tasks.lm.collate import Batch, collate
from tasks.lm.model import LanguageModel
from tasks.lm.respond import response_logits
from tasks.stage import ParamsError

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its response


class Observed:
    """The linear layers that read a norm's output, and the largest absolute value of each of its channels."""

    def __init__(self) -> None:
        self.readers: dict[str, nn.Linear] = {}
        self.largest: Tensor = torch.zeros(())


def smooth(lm: LanguageModel, pairs: Sequence[Pair], strength: float, batch_size: int) -> int:
    """Smooth the model of `lm` in place, by what `pairs` activate; return the number of norms that were scaled.

    Raises ParamsError when the model would no longer compute the same, as one does whose norms have readers
    other than linear layers.
    """
    batches = [
        collate(lm, *zip(*pairs[start : start + batch_size], strict=True))
        for start in range(0, len(pairs), batch_size)
    ]
    before = _logits(lm, batches[0])
    observed = observe(lm, batches)
    inner = set(quantizable(lm.model))
    smoothed = 0
    with torch.no_grad():
        for norm, seen in observed.items():
            if not seen.readers or not set(seen.readers) <= inner:
                continue
            smoothed += 1
            weights = torch.stack([layer.weight.abs().amax(dim=0) for layer in seen.readers.values()])
            factors = smoothing_factors(seen.largest, weights.amax(dim=0), strength)
            for parameter in norm.parameters():
                parameter.div_(factors)
            for layer in seen.readers.values():
                layer.weight.mul_(factors)
    if not torch.allclose(_logits(lm, batches[0]), before, rtol=1e-3, atol=1e-3):
        raise ParamsError(
            f"quantize.smoothing does not fit {lm.model.config.model_type}: its norms are read by more than "
            "linear layers; set it to null"
        )
    return smoothed


def observe(lm: LanguageModel, batches: Sequence[Batch]) -> dict[nn.Module, Observed]:
    """Who reads each norm's output in `batches`, and how large it gets."""
    found: dict[nn.Module, Observed] = {}
    outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # held, so that no id is given twice in a pass

    def written(norm: nn.Module, _: Any, output: Tensor) -> None:
        outputs[id(output)] = (output, norm)
        seen = found.setdefault(norm, Observed())
        seen.largest = torch.maximum(seen.largest.to(output.device), output.abs().flatten(0, -2).amax(dim=0))

    with ExitStack() as hooks:
        for name, module in lm.model.named_modules():
            if isinstance(module, nn.Linear):

                def read(layer: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                    if id(inputs[0]) in outputs:
                        found[outputs[id(inputs[0])][1]].readers[name] = layer  # type: ignore[assignment]

                hooks.callback(module.register_forward_pre_hook(read).remove)
            elif type(module).__name__.endswith("Norm"):
                hooks.callback(module.register_forward_hook(written).remove)
        for batch in batches:
            _logits(lm, batch)
            outputs.clear()
    return found


def _logits(lm: LanguageModel, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return response_logits(lm, batch)
