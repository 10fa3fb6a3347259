"""Smaller models of the same kind: with the best heads and channels, narrower heads, or random weights."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from tasks.compress.low_rank import low_rank
from tasks.compress.pruning import best_units, importance, unit_importance
from tasks.lm.model import LanguageModel
from tasks.lm.scratch import with_random_weights
from tasks.lm.structure import (
    Units,
    rebuilt,
    set_channels,
    set_heads,
    set_layers,
    stacks,
    units,
    unrotated_attentions,
    with_units,
)
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


def narrower_heads(lm: LanguageModel, size: int, norms: Mapping[str, Tensor]) -> LanguageModel:
    """A copy in which each head is `size` wide, and does as nearly as it can what it did.

    A head acts through two products: of queries and keys, and of values and what it writes. Both become the
    nearest products of lower rank; `norms` are those of what each linear layer is given. Raises ParamsError
    when heads are not as wide, or rotate queries and keys by position, so that their product is not one matrix.
    """
    config = copy.deepcopy(lm.model.config)
    attentions = unrotated_attentions(lm)
    if not attentions:
        raise ParamsError(
            f"heads of a {config.model_type} cannot be made narrower, only those of a T5, whose queries and "
            "keys are not rotated by position; set distill.student.head_size to null"
        )
    if size > config.head_dim:
        raise ParamsError(f"heads {size} wide are wanted of heads {config.head_dim} wide; ask for less")
    given: dict[str, Tensor] = lm.model.state_dict()
    narrow = dict(given)
    sizes = [config.head_dim] * config.num_attention_heads
    everywhere = torch.ones(config.hidden_size)
    for name in attentions:
        query, key, value, writer = (f"{name}.{each}" for each in "qkvo")
        parts = [given[f"{each}.weight"].split_with_sizes(sizes) for each in (query, key, value)]
        parts.append(given[f"{writer}.weight"].split_with_sizes(sizes, dim=1))
        heads = [
            (
                *low_rank(q.T, k, size, norms[query], norms[key]),
                *low_rank(o, v, size, everywhere, norms[value]),
            )
            for q, k, v, o in zip(*parts, strict=True)
        ]
        queries, keys, writers, values = zip(*heads, strict=True)
        narrow[f"{query}.weight"] = torch.cat(queries, dim=1).T
        narrow[f"{key}.weight"] = torch.cat(keys)
        narrow[f"{value}.weight"] = torch.cat(values)
        narrow[f"{writer}.weight"] = torch.cat(writers, dim=1)
    config.head_dim = size
    return rebuilt(lm, config, narrow.__getitem__)


def from_scratch(
    lm: LanguageModel,
    *,
    width: int | None,
    encoder: int | None,
    decoder: int | None,
    heads: int | None,
    head_size: int | None,
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
    if head_size is not None:
        config.head_dim = head_size
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
