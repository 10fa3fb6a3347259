"""Counts and activations of `lifecycle plan`, against real models of both families."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from lm_toys import ARCHITECTURE, FAMILIES, METHODS, OPTIONS, toy
from test_planning import ADAPTERS, FLAN_T5_BASE, LLAMA_2_7B, LLAMA_2_70B, LORA, shape

from tasks.lm.collate import Batch
from tasks.lm.model import LanguageModel
from tasks.lm.peft import adapt, parameter_counts
from tasks.lm.respond import response_logits
from tasks.planning import memory
from tasks.planning.counts import Counts, counts
from tasks.planning.shape import config_of

ROWS, PROMPT, RESPONSE = 2, 24, 10


@cache
def real(family: str) -> LanguageModel:
    return toy(family)


def fresh(family: str) -> LanguageModel:
    """A model of the same config for an adapter to change."""
    lm = real(family)
    return LanguageModel(type(lm.model)(lm.model.config).eval(), lm.tokenizer)


def config(family: str) -> dict[str, Any]:
    return config_of({**ARCHITECTURE, "family": family, "vocabulary": len(real(family).tokenizer)})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_real_model(family: str, method: str) -> None:
    trained, total = parameter_counts(adapt(fresh(family), method, OPTIONS[method]))
    assert counts(config(family), method, OPTIONS[method]) == Counts(total, trained)
    if method == "lora":
        assert counts(config(family), "qlora", OPTIONS["qlora"]) == Counts(total, trained)
    if method == "full":
        assert shape(config(family)).parameters == total


@pytest.mark.parametrize("published", [LLAMA_2_7B, LLAMA_2_70B, FLAN_T5_BASE])
def test_counts_of_models_on_the_hub(published: Mapping[str, Any]) -> None:
    assert counts(published, "full", {}).total == shape(published).parameters


@pytest.mark.parametrize(("name", "published"), [("7B", LLAMA_2_7B), ("70B", LLAMA_2_70B)])
def test_counts_of_adapters_on_large_models(name: str, published: Mapping[str, Any]) -> None:
    assert counts(published, "lora", LORA | {"alpha": 16}).trained == ADAPTERS[name]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_activations_are_what_autograd_keeps(family: str, method: str, mixed: bool) -> None:
    """Every tensor that the forward pass keeps for the backward pass, each once, but the weights."""
    lm = adapt(fresh(family), method, OPTIONS[method] | ({"dropout": 0.0} if "lora" in method else {}))
    lm.model.train()
    ids = torch.randint(3, 90, (ROWS, PROMPT + RESPONSE))
    ones = torch.ones_like(ids)
    ones[0, 0 if family == "llama" else PROMPT - 1] = 0  # padding, as batches have it
    batch = Batch(ids[:, :PROMPT], ones[:, :PROMPT], ids[:, PROMPT:], torch.ones_like(ids[:, PROMPT:]))
    weights = {each.untyped_storage().data_ptr() for each in lm.model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = response_logits(lm, batch)
    assert logits.requires_grad
    kept = memory.kept(method, OPTIONS[method] | {"dropout": 0.0})
    of = shape(config(family))
    expected = memory.activations(of, kept, ROWS, PROMPT, RESPONSE, memory.Target(mixed=mixed))
    if mixed:
        expected += memory.copies(of, kept)
    assert 0.8 < expected / sum(found.values()) < 1.2
