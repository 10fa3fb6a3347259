"""A model with part of its weights taken away, as zeros or as whole heads and channels, and tuned again."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.compress.pruning import (
    GROUP,
    global_masks,
    importance,
    layer_mask,
    pruned_count,
    rows_mask,
    two_of_four_mask,
)
from tasks.compress.shrink import fewer_units
from tasks.lm.collate import collate
from tasks.lm.model import LanguageModel
from tasks.lm.peft import adapt, merged
from tasks.lm.respond import response_logits
from tasks.lm.schedule import Schedule
from tasks.lm.structure import linear_layers, units
from tasks.lm.train import Pair, Training, train
from tasks.stage import Context, ParamsError

Tensors = Mapping[str, Tensor]  # by the name of a linear layer


class Pruned(NamedTuple):
    """A pruned copy of a model, and which weights of its linear layers stayed; empty where it is smaller."""

    lm: LanguageModel
    masks: dict[str, Tensor]


def input_norms(lm: LanguageModel, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The norm `[I]` of each input feature of each linear layer, over all tokens of the pairs.

    The pairs are read one by one: there is no padding that could count. All inputs are those of the dense
    model; the authors of Wanda take each layer's behind the layers that they have pruned already.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].detach().flatten(0, -2).double().square().sum(dim=0)
            sums[name] = squares + sums[name] if name in sums else squares

        return hook

    hooks = [module.register_forward_pre_hook(add(name)) for name, module in linear_layers(lm).items()]
    try:
        with torch.inference_mode():
            for prompt, response in pairs:
                response_logits(lm, collate(lm, [prompt], [response]))
    finally:
        for each in hooks:
            each.remove()
    return {name: total.sqrt().float().clone() for name, total in sums.items()}


def pruned(lm: LanguageModel, pattern: str, scope: str, sparsity: float, norms: Tensors | None) -> Pruned:
    """A pruned copy of `lm`, by magnitude, or with `norms` by Wanda.

    `unstructured`: the share `sparsity` of the weights of linear layers goes, compared within each `row`, each
    `layer` or all of them (`global`); `2:4`: two of each four weights; `structured`: that share of the heads
    and of the channels of each layer, but never all.

    Raises ParamsError when the model has not the shape for it.
    """
    if pattern == "structured":
        heads, channels = (
            next(entry.number for entry in units(lm) if entry.kind == kind) for kind in ("heads", "channels")
        )
        kept = [max(number - pruned_count(number, sparsity), 1) for number in (heads, channels)]
        return Pruned(fewer_units(lm, heads=kept[0], channels=kept[1], norms=norms), {})
    sparse = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer)
    layers = linear_layers(sparse)
    scores = {
        name: importance(layer.weight.detach(), None if norms is None else norms[name])
        for name, layer in layers.items()
    }
    masks = _masks(scores, pattern, scope, sparsity)
    apply_masks(sparse, masks)
    return Pruned(sparse, masks)


def apply_masks(lm: LanguageModel, masks: Tensors) -> None:
    """Set the weights that do not stay to zero, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            lm.model.get_submodule(name).weight.masked_fill_(~mask, 0.0)


def sparsity_of(lm: LanguageModel, masks: Tensors) -> float:
    """The share of the masked layers' weights that was taken away.

    Raises RuntimeError when one of these weights is not zero: then what is told of the model is not true.
    """
    for name, mask in masks.items():
        left = int((lm.model.get_submodule(name).weight.detach()[~mask] != 0).sum())
        if left:
            raise RuntimeError(f"{name}: {left} of {int((~mask).sum())} pruned weights are not zero")
    gone = sum(int((~mask).sum()) for mask in masks.values())
    return gone / sum(mask.numel() for mask in masks.values())


def recover(
    found: Pruned,
    lora: Mapping[str, Any],
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    schedule: Schedule,
    learning_rate: float,
    context: Context,
) -> tuple[LanguageModel, Training]:
    """Tune a pruned model with LoRA and merge it: what was taken away stays away, in training too.

    `lora` are the options of `adapt`. Resumes, and raises, as `train`.
    """
    tuned = adapt(found.lm, "lora", lora)
    with _only_where(tuned, found.masks):
        training = train(
            tuned,
            len(pairs),
            lambda draw: pairs[draw % len(pairs)],
            held_out,
            schedule,
            learning_rate,
            context,
        )
    plain = merged(tuned)
    apply_masks(plain, found.masks)
    return plain, training


@contextmanager
def _only_where(tuned: LanguageModel, masks: Tensors) -> Iterator[None]:
    """For the time of the block an adapter changes the outputs by its update under the mask: (W + BA) ⊙ M."""

    def corrected(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            outside = layer.get_delta_weight("default").masked_fill(mask, 0.0)
            return output - F.linear(inputs[0], outside.to(output.dtype))

        return hook

    adapted = {
        name: tuned.model.get_base_model().get_submodule(name)
        for name in masks
        if hasattr(tuned.model.get_base_model().get_submodule(name), "lora_A")
    }
    hooks = [layer.register_forward_hook(corrected(masks[name])) for name, layer in adapted.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _masks(scores: Tensors, pattern: str, scope: str, sparsity: float) -> dict[str, Tensor]:
    if pattern == "2:4":
        for name, each in scores.items():
            if each.shape[-1] % GROUP:
                raise ParamsError(
                    f"prune.pattern: 2:4 needs rows of a multiple of {GROUP} weights; those of {name} have "
                    f"{each.shape[-1]}; take unstructured"
                )
        return {name: two_of_four_mask(each) for name, each in scores.items()}
    if scope == "global":
        return global_masks(scores, sparsity)
    choose = rows_mask if scope == "row" else layer_mask
    return {name: choose(each, sparsity) for name, each in scores.items()}
