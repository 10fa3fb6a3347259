"""Exact parameter counts of a model and of what a method trains in it: built on torch's meta device, which
holds shapes and no numbers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Counts(NamedTuple):
    """Numbers of parameters; `total` has those of an adapter in it."""

    total: int
    trained: int


def counts(config: Mapping[str, Any], method: str, options: Mapping[str, Any]) -> Counts:
    """What `tasks.lm.peft.adapt` makes of a model with this config.json, counted; tied weights count once.

    `options` are those of the method, without its learning rate. Raises ParamsError when the method does not
    fit the model.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from tasks.lm.model import LanguageModel
    from tasks.lm.peft import adapt, parameter_counts
    from tasks.planning.shape import has_own_head

    known = {name: value for name, value in config.items() if name != "model_type"}
    read = AutoConfig.for_model(config["model_type"], **known)
    family = AutoModelForSeq2SeqLM if read.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = family.from_config(read)
        model.tie_weights()
        if has_own_head(config):  # which from_pretrained sees by the weights, and from_config cannot
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.new_empty(model.lm_head.weight.shape))
        # the numbers of a 4-bit base are those of the base itself
        lm = adapt(LanguageModel(model, None), "lora" if method == "qlora" else method, options)
    trained, total = parameter_counts(lm)
    return Counts(total, trained)
