"""Smaller models of the same kind: with the most important heads and channels, or with random weights."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from tasks.compress.pruning import best_units, importance, unit_importance
from tasks.lm.model import LanguageModel
from tasks.lm.scratch import with_random_weights
from tasks.lm.structure import Units, set_channels, set_heads, set_layers, stacks, units, with_units
from tasks.stage import ParamsError


def fewer_units(
    lm: LanguageModel, *, heads: int | None, channels: int | None, norms: Mapping[str, Tensor] | None = None
) -> LanguageModel:
    """A copy with so many heads (of keys and values) and channels in each layer (None: all), the best ones.

    A unit is as important as its weights are large; with `norms`, the norms of what each linear layer is given,
    as the weights that it acts through are, times those norms. Raises ParamsError when there are not as many.
    """
    kept = []
    for entry in units(lm):
        wanted = heads if entry.kind == "heads" else channels
        if wanted is None:
            continue
        if wanted > entry.number:
            raise ParamsError(
                f"{wanted} {entry.kind} are wanted of {entry.number} in each layer; ask for fewer"
            )
        kept.append((entry, best_units(_scores(lm, entry, norms), wanted)))
    return with_units(lm, kept)


def from_scratch(
    lm: LanguageModel,
    *,
    width: int | None,
    encoder: int | None,
    decoder: int | None,
    heads: int | None,
    channels: int | None,
) -> LanguageModel:
    """A model of the same kind and vocabulary with random weights (from torch's generator), of another size.

    Null: as large as `lm` is.
    """
    config = copy.deepcopy(lm.model.config)
    layers = [len(each) for each in stacks(lm).values()]
    wanted = [encoder, decoder] if lm.is_encoder_decoder else [decoder]
    set_layers(config, *(had if asked is None else asked for had, asked in zip(layers, wanted, strict=True)))
    if width is not None:
        config.hidden_size = width
    if heads is not None:
        set_heads(config, heads)
    if channels is not None:
        set_channels(config, channels)
    model = with_random_weights(config).to(lm.device)
    model.generation_config = copy.deepcopy(lm.model.generation_config)
    return LanguageModel(model.eval(), lm.tokenizer)


def _scores(lm: LanguageModel, entry: Units, norms: Mapping[str, Tensor] | None) -> Tensor:
    if norms is None:
        parts = [entry.cut(lm.model.get_parameter(name), dimension) for name, dimension in entry.parts]
    else:
        parts = [
            entry.cut(importance(lm.model.get_parameter(f"{name}.weight"), norms[name]), 1)
            for name in entry.writers
        ]
    with torch.no_grad():
        return unit_importance(parts)
