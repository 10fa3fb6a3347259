"""The stage `prune`: masks are exact, Wanda sees the inputs, and what was taken away stays away."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_stages import RECOVERY, prune_section, with_dense
from lm_toys import COMPUTE, FAMILIES, context, toy, unsaved
from torch import Tensor

from tasks.compress.pruning import (
    best_units,
    global_masks,
    importance,
    layer_mask,
    rows_mask,
    two_of_four_mask,
    unit_importance,
)
from tasks.compress.sparse import _only_where, apply_masks, input_norms, pruned, sparsity_of
from tasks.lm.collate import collate
from tasks.lm.model import LanguageModel, load
from tasks.lm.peft import adapt, merged
from tasks.lm.respond import response_logits
from tasks.lm.structure import linear_layers, units, with_units
from tasks.lm.train import Pair
from tasks.prune import Params, prune
from tasks.stage import DataError, ParamsError
from tasks.stage.params import validate

LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}


def weights(rows: int = 6, columns: int = 16, seed: int = 0) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def pairs_of(lm: LanguageModel) -> list[Pair]:
    end = lm.tokenizer.eos_token_id
    return [([40 + row, 50, 60 + row][: 1 + row % 3], [70 + row, 80, end][row % 2 :]) for row in range(5)]


def test_importance_is_by_hand() -> None:
    weight, norms = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([2.0, 4.0])
    assert importance(weight, None).tolist() == [[1, 2], [3, 0.5]]
    assert importance(weight, norms).tolist() == [[2, 8], [6, 2]]
    assert rows_mask(importance(weight, None), 0.5).tolist() == [[False, True], [True, False]]
    assert rows_mask(importance(weight, norms), 0.5).tolist() == [[False, True], [True, False]]
    assert layer_mask(importance(weight, None), 0.5).tolist() == [[False, True], [True, False]]
    assert layer_mask(importance(weight, norms), 0.25).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.9])
def test_each_scope_takes_exactly_its_share_the_least_first(sparsity: float) -> None:
    scores = weights().abs()
    rows = rows_mask(scores, sparsity)
    assert (~rows).sum(dim=1).tolist() == [round(16 * sparsity)] * 6
    assert all(row[~keep].max() < row[keep].min() for row, keep in zip(scores, rows, strict=True))
    layer = layer_mask(scores, sparsity)
    assert int((~layer).sum()) == round(96 * sparsity)
    assert scores[~layer].max() < scores[layer].min()
    many = {"small": scores, "large": scores * 100}
    both = global_masks(many, sparsity)
    assert sum(int((~mask).sum()) for mask in both.values()) == round(192 * sparsity)
    assert (~both["small"]).float().mean() > (~both["large"]).float().mean()


def test_ties_do_not_change_how_many_go() -> None:
    assert (~rows_mask(torch.ones(3, 10), 0.5)).sum(dim=1).tolist() == [5, 5, 5]
    assert int((~layer_mask(torch.zeros(4, 4), 0.25)).sum()) == 4


def test_two_of_four_stay_in_each_four() -> None:
    scores = weights().abs()
    mask = two_of_four_mask(scores)
    fours = mask.view(-1, 4)
    assert fours.sum(dim=1).tolist() == [2] * 24
    for values, keep in zip(scores.view(-1, 4), fours, strict=True):
        assert values[keep].min() > values[~keep].max()


def test_a_unit_is_as_important_as_all_of_its_weights() -> None:
    parts = [torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0], [0.0]])]
    assert unit_importance(parts).tolist() == [5.0, 1.0]
    assert best_units(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3) == [1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_of_the_inputs_that_layers_are_given(family: str) -> None:
    lm = toy(family)
    pairs = pairs_of(lm)
    seen: dict[str, list[Tensor]] = {name: [] for name in linear_layers(lm)}
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, __, name=name: seen[name].append(inputs[0].flatten(0, -2))
        )
        for name, layer in linear_layers(lm).items()
    ]
    with torch.inference_mode():
        for prompt, response in pairs:
            response_logits(lm, collate(lm, [prompt], [response]))
    for hook in hooks:
        hook.remove()
    found = input_norms(lm, pairs)
    assert set(found) == set(seen)
    for name, inputs in seen.items():
        torch.testing.assert_close(found[name], torch.cat(inputs).norm(dim=0), rtol=1e-5, atol=1e-6)
    assert not any(layer._forward_pre_hooks for layer in linear_layers(lm).values())


def test_the_head_and_the_embeddings_are_left_alone() -> None:
    for family in FAMILIES:
        lm = toy(family)
        names = set(linear_layers(lm))
        assert names
        assert not any("lm_head" in name or "embed" in name or "shared" in name for name in names)
        found = pruned(lm, "unstructured", "row", 0.5, None)
        untouched = [
            name for name, _ in lm.model.named_parameters() if name.removesuffix(".weight") not in names
        ]
        before, after = lm.model.state_dict(), found.lm.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in untouched)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_a_pruned_copy_is_as_sparse_as_asked_and_the_dense_model_stays(family: str, scope: str) -> None:
    lm = toy(family)
    before = copy.deepcopy(lm.model.state_dict())
    found = pruned(lm, "unstructured", scope, 0.5, input_norms(lm, pairs_of(lm)))
    assert sparsity_of(found.lm, found.masks) == 0.5
    zeros = sum(int((layer.weight == 0).sum()) for layer in linear_layers(found.lm).values())
    assert zeros == sum(layer.weight.numel() for layer in linear_layers(lm).values()) // 2
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())


def test_a_weight_that_came_back_is_an_error() -> None:
    found = pruned(toy("t5"), "2:4", "row", 0.5, None)
    name, mask = next(iter(found.masks.items()))
    row, column = (~mask).nonzero()[0].tolist()
    with torch.no_grad():
        found.lm.model.get_submodule(name).weight[row, column] = 0.1
    with pytest.raises(RuntimeError, match=rf"{name}: 1 of {int((~mask).sum())} pruned weights are not zero"):
        sparsity_of(found.lm, found.masks)


def test_2_4_wants_rows_of_a_multiple_of_four() -> None:
    with pytest.raises(ParamsError, match=r"rows of a multiple of 4 weights; those of .* have 66"):
        pruned(toy("llama", d_ff=66), "2:4", "row", 0.5, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_some_units_the_model_computes_what_it_does_with_them_set_to_zero(family: str) -> None:
    """What a unit does goes through columns of one layer: with zeros there it is as if it were gone."""
    lm = toy(family, layers=2)
    silent = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer)
    kept = []
    for entry in units(lm):
        stay = [unit for unit in range(entry.number) if unit % 4 != 1]
        kept.append((entry, stay))
        for name in entry.writers:
            weight = silent.model.get_parameter(f"{name}.weight").data
            weight.view(weight.shape[0], entry.number, -1)[:, 1::4] = 0
    smaller = with_units(lm, kept)
    assert sum(p.numel() for p in smaller.model.parameters()) < sum(p.numel() for p in lm.model.parameters())
    batch = collate(lm, *zip(*pairs_of(lm), strict=True))
    with torch.inference_mode():
        torch.testing.assert_close(response_logits(smaller, batch), response_logits(silent, batch))
        assert not torch.allclose(response_logits(smaller, batch), response_logits(lm, batch), atol=1e-2)


def test_queries_go_with_the_keys_and_values_that_they_share() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    lm = LanguageModel(LlamaForCausalLM(config).eval(), toy("llama").tokenizer)
    heads = next(entry for entry in units(lm) if entry.kind == "heads")
    smaller = with_units(lm, [(heads, [0, 2])])
    assert (smaller.model.config.num_attention_heads, smaller.model.config.num_key_value_heads) == (4, 2)
    with torch.no_grad():
        weight = lm.model.model.layers[0].self_attn.o_proj.weight
        weight.view(32, 4, 8)[:, [1, 3]] = 0
        ids = torch.arange(10)[None]
        torch.testing.assert_close(smaller.model(ids).logits, lm.model(ids).logits)


def test_other_layers_are_refused_in_one_line() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16))
    with pytest.raises(ParamsError, match="gpt2: its layers are neither those of T5 nor those of Llama"):
        units(LanguageModel(model, toy("llama").tokenizer))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_under_the_mask_is_what_is_merged(family: str) -> None:
    found = pruned(toy(family), "unstructured", "row", 0.5, None)
    tuned = adapt(found.lm, "lora", LORA)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = collate(tuned, *zip(*pairs_of(tuned), strict=True))
    free = response_logits(tuned, batch)
    with _only_where(tuned, found.masks):
        held = response_logits(tuned, batch)
        held.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tuned.model.parameters())
    assert (free - held).abs().max() > 1e-3
    plain = merged(tuned)
    apply_masks(plain, found.masks)
    torch.testing.assert_close(response_logits(plain, batch), held, rtol=1e-3, atol=1e-4)
    assert sparsity_of(plain, found.masks) == 0.5


def called(root: Path, **changes: Any) -> Mapping[str, Any]:
    """The stage as a function, in the folder `root`."""
    section = prune_section(**{"model": {"source": str(root / "models/ppo"), "revision": None}, **changes})
    if section["recovery"] is not None:
        section["recovery"] = {**section["recovery"], "schedule": unsaved(section["recovery"]["schedule"])}
    data = root / "data" / "examples"
    return prune(
        validate(section, "prune", Params),
        data / "train.jsonl",
        data / "validation.jsonl",
        root / "models" / "prune",
        root / "reports" / "prune",
        context(root, "prune"),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "structured"])
def test_recovery_helps_and_keeps_what_is_gone_away(family: str, pattern: str, tmp_path: Path) -> None:
    here = with_dense(tmp_path, family)
    sweep = {**prune_section()["sweep"], "sparsities": [0.5], "methods": ["wanda"]}
    recovery = {**RECOVERY, "learning_rate": 0.05, "schedule": {**RECOVERY["schedule"], "epochs": 8}}
    metrics = called(here.root, pattern=pattern, recovery=recovery, sweep=sweep)
    assert metrics["loss"] < metrics["loss_before_recovery"] - 0.1
    opened = load(here.root / "models" / "prune", COMPUTE)
    assert sum(p.numel() for p in opened.model.parameters()) == metrics["parameters"]
    if (family, pattern) == ("t5", "unstructured"):
        tuned = (here.root / "models" / "prune" / "model.safetensors").read_bytes()
        assert called(here.root, pattern=pattern, recovery=recovery, sweep=sweep) == metrics
        assert (here.root / "models" / "prune" / "model.safetensors").read_bytes() == tuned
    if pattern == "structured":
        assert metrics["bytes_ratio"] < 0.8
        return
    assert metrics["sparsity"] == 0.5
    assert metrics["bytes_ratio"] == 1
    for layer in linear_layers(opened).values():
        zeros = layer.weight == 0
        assert int(zeros.sum()) == layer.weight.numel() // 2
        assert pattern == "unstructured" or (zeros.view(-1, 4).sum(dim=1) == 2).all()


def test_the_sweep_has_every_method_pattern_and_sparsity(tmp_path: Path) -> None:
    here = with_dense(tmp_path, "t5")
    sweep = {**prune_section()["sweep"], "patterns": ["unstructured", "2:4", "structured"]}
    first = called(here.root, sweep=sweep)
    assert first["loss"] == first["loss_before_recovery"]
    lines = (here.root / "reports" / "prune" / "sweep.csv").read_text().splitlines()
    assert lines[0].startswith("method,pattern,sparsity,rougeL,slot_f1,")
    assert len(lines) == 1 + 2 * (2 + 1 + 2)
    made = [here.root / "reports", here.root / "models" / "prune"]
    files = {path: path.read_bytes() for folder in made for path in folder.rglob("*") if path.is_file()}
    assert any(path.suffix == ".safetensors" for path in files)
    assert called(here.root, sweep=sweep) == first
    assert {path: path.read_bytes() for path in files} == files


def test_structured_models_open_without_our_code(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    here = with_dense(tmp_path, "t5")
    metrics = called(here.root, pattern="structured")
    plain = AutoModelForSeq2SeqLM.from_pretrained(here.root / "models" / "prune")
    assert (plain.config.num_heads, plain.config.d_ff) == (2, 32)
    assert metrics["sparsity"] == 1 - metrics["parameters"] / metrics["parameters_dense"]
    ids = torch.tensor([[40, 50, 1]])
    ours = load(here.root / "models" / "prune", COMPUTE).model
    assert torch.equal(plain(ids, decoder_input_ids=ids).logits, ours(ids, decoder_input_ids=ids).logits)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "sing"}, DataError, "no example of sing, which is prune.task"),
        ({"pattern": "2:4", "sparsity": 0.3}, ParamsError, "sparsity 0.3 must be 0.5"),
        ({"method": "wand"}, ParamsError, "did you mean wanda"),
    ],
)
def test_what_cannot_be_is_one_line(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    here = with_dense(tmp_path, "t5")
    with pytest.raises(error, match=message) as caught:
        called(here.root, **changes)
    assert "\n" not in str(caught.value)
