"""The tuning methods: what each trains, that it starts as the base, and that it is saved whole."""

from pathlib import Path

import pytest
import torch
from lm_toys import COMPUTE, FAMILIES, GREEDY, METHODS, OPTIONS, shake, texts, toy
from safetensors.torch import load_file

from tasks.lm import peft
from tasks.lm.collate import Batch, collate, encode_prompts, encode_responses
from tasks.lm.lora import LoraLinear
from tasks.lm.model import LanguageModel, is_adapter, load, save
from tasks.lm.peft import adapt, load_nf4, merged_to_answer, parameter_counts
from tasks.lm.respond import generate, respond, response_logits, response_logprobs
from tasks.stage import ParamsError, UserError

PROMPTS = [text[: 20 + 12 * number] for number, text in enumerate(texts(6))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        save(toy(family), folder / family)
    return {family: folder / family for family in FAMILIES}


def tuned(base: Path, method: str) -> LanguageModel:
    torch.manual_seed(2)
    loaded = load_nf4(base, COMPUTE) if method == "qlora" else load(base, COMPUTE, trainable=True)
    return adapt(loaded, method, OPTIONS[method])


def batch_of(lm: LanguageModel) -> Batch:
    return collate(lm, encode_prompts(lm, PROMPTS), encode_responses(lm, texts(6, seed=6)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_opened_it_answers_the_same(
    family: str, method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    lm = tuned(bases[family], method)
    shake(lm)
    lm.model.eval()
    save(lm, tmp_path / "tuned")
    save(lm, tmp_path / "again")
    for path in (tmp_path / "tuned").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    opened = load(tmp_path / "tuned", COMPUTE)
    assert is_adapter(opened) == (method not in ("full", "bitfit"))
    assert not is_adapter(opened) or parameter_counts(opened)[0] == 0
    batch = batch_of(lm)
    torch.testing.assert_close(response_logprobs(opened, batch), response_logprobs(lm, batch))
    answers = respond(lm, PROMPTS, GREEDY, batch_size=6, seed=0)
    assert respond(opened, PROMPTS, GREEDY, batch_size=6, seed=0) == answers
    untuned = response_logprobs(load(bases[family], COMPUTE), batch)
    assert not torch.allclose(response_logprobs(lm, batch), untuned, atol=1e-3)


def test_pickled_weights_of_an_adapter_are_not_opened(bases: dict[str, Path], tmp_path: Path) -> None:
    save(tuned(bases["llama"], "lora"), tmp_path / "tuned")
    weights = tmp_path / "tuned" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_name("adapter_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors, and pickled weights are not opened"):
        load(tmp_path / "tuned", COMPUTE)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning", "ia3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_with_an_adapter(family: str, method: str, bases: dict[str, Path]) -> None:
    lm = tuned(bases[family], method)
    shake(lm)
    lm.model.eval()
    prompts, responses = encode_prompts(lm, PROMPTS), encode_responses(lm, texts(6, seed=6))
    together = response_logprobs(lm, collate(lm, prompts, responses))
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone = response_logprobs(lm, collate(lm, [prompt], [response]))[0]
        torch.testing.assert_close(together[row, : len(response)], alone, atol=1e-5, rtol=0)
    one, six = (respond(lm, PROMPTS, GREEDY, batch_size=size, seed=0) for size in (1, 6))
    assert one == six


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_teacher_forcing_agree_with_virtual_tokens(
    family: str, method: str, bases: dict[str, Path]
) -> None:
    lm = tuned(bases[family], method)
    shake(lm)
    lm.model.eval()
    prompts = collate(lm, encode_prompts(lm, PROMPTS), [[] for _ in PROMPTS])
    ids, mask = generate(lm, prompts.prompt_ids, prompts.prompt_mask, GREEDY)
    best = response_logits(lm, Batch(prompts.prompt_ids, prompts.prompt_mask, ids, mask)).argmax(dim=-1)
    assert torch.equal(best[mask == 1], ids[mask == 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_starts_as_the_base_and_merges_into_itself(family: str, bases: dict[str, Path]) -> None:
    base, lm = load(bases[family], COMPUTE), tuned(bases[family], "lora")
    lm.model.eval()
    batch = batch_of(lm)
    with torch.inference_mode():  # with gradients PyTorch may take another attention kernel for each of the two
        torch.testing.assert_close(response_logits(lm, batch), response_logits(base, batch), atol=0, rtol=0)
    shake(lm, by=0.03)
    unmerged = response_logprobs(lm, batch)
    assert (unmerged - response_logprobs(base, batch)).abs().max() > 1e-2
    merged = merged_to_answer(lm)
    assert not is_adapter(merged)
    torch.testing.assert_close(response_logprobs(merged, batch), unmerged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_method_names_is_trained(family: str, method: str, bases: dict[str, Path]) -> None:
    lm = tuned(bases[family], method)
    names = [name for name, parameter in lm.model.named_parameters() if parameter.requires_grad]
    marks = {
        "lora": ["lora_"],
        "prompt_tuning": ["prompt_encoder"],
        "prefix_tuning": ["prompt_encoder"],
        "ia3": ["ia3_"],
        "bitfit": ["bias", "norm"],
        "full": [""],
    }
    assert names
    assert all(any(mark in name for mark in marks[method]) for name in names)
    trainable, total = parameter_counts(lm)
    assert trainable == total if method == "full" else 0 < trainable < 0.2 * total


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("lora", {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": None}, 884_736),
        ("lora", {"r": 16, "alpha": 16, "dropout": 0.0, "target_modules": None}, 1_769_472),
        ("lora", {"r": 32, "alpha": 16, "dropout": 0.0, "target_modules": None}, 3_538_944),
        ("ia3", {"target_modules": None, "feedforward_modules": None}, 104_448),
        ("prompt_tuning", {"virtual_tokens": 20}, 30_720),
        ("prefix_tuning", {"virtual_tokens": 20}, 368_640),
    ],
)
def test_parameter_counts_on_the_geometry_of_flan_t5_base(
    method: str, options: dict[str, object], expected: int
) -> None:
    """On the meta device: shapes without memory."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    tokenizer = toy("t5").tokenizer
    with torch.device("meta"):
        lm = LanguageModel(T5ForConditionalGeneration(config), tokenizer)
        assert parameter_counts(lm) == (222_903_552, 222_903_552)
        adapted = adapt(lm, method, options)
    assert parameter_counts(adapted) == (expected, 222_903_552 + expected)


def test_lora_on_one_matrix() -> None:
    """8 · 64 + 512 · 8 = 4,608 parameters in place of 32,768 (−86 %)."""
    from peft import LoraConfig, get_peft_model

    layer = torch.nn.Sequential(torch.nn.Linear(64, 512, bias=False))
    adapted = get_peft_model(layer, LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
    assert adapted.get_nb_trainable_parameters() == (4_608, 4_608 + 32_768)


@pytest.mark.parametrize("method", ["full", "prompt_tuning", "qlora", "half"])
def test_what_cannot_take_its_adapter_in_answers_with_it(method: str, bases: dict[str, Path]) -> None:
    lm = tuned(bases["t5"], "lora" if method == "half" else method)
    if method == "half":
        lm.model.bfloat16()
    assert merged_to_answer(lm) is lm


@pytest.mark.parametrize("family", FAMILIES)
def test_qlora_trains_lora_on_a_base_in_four_bits(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    save(toy(family), base)
    lm = tuned(base, "qlora")
    kinds = {type(parameter).__name__ for parameter in lm.model.parameters()}
    assert "Params4bit" in kinds
    assert not any(isinstance(module, LoraLinear) for module in lm.model.modules()), "PEFT merges its own"
    full = parameter_counts(load(base, COMPUTE))[1]
    trainable, total = parameter_counts(lm)
    assert (trainable, total) == (parameter_counts(tuned(base, "lora"))[0], full + trainable)
    for _ in ("at once", "after an answer, which may bring another kernel in"):
        lm.model.train()
        lm.model.zero_grad()
        response_logprobs(lm, batch_of(lm)).mean().backward()
        gradients = [p.grad.norm() for name, p in lm.model.named_parameters() if "lora_B" in name]
        assert all(gradients)
        lm.model.eval()
        respond(lm, PROMPTS, GREEDY, batch_size=6, seed=0)
    save(lm, tmp_path / "tuned")
    opened = load(tmp_path / "tuned", COMPUTE)
    assert is_adapter(opened)
    lm.model.eval()
    ours = response_logprobs(lm, batch_of(lm))
    drift = (response_logprobs(opened, batch_of(lm)) - ours).abs().mean()
    assert 0 < drift < 0.5 * ours.abs().mean()  # the adapter is opened on the unquantised base


def test_qlora_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ParamsError, match=r"qlora needs bitsandbytes; install it: pip install '.\[qlora\]'"):
        load_nf4("anywhere", COMPUTE)


def test_modules_that_are_not_there_are_one_line(bases: dict[str, Path]) -> None:
    lm = load(bases["t5"], COMPUTE, trainable=True)
    with pytest.raises(ParamsError, match=r"lora on t5: Target modules .*no_such_layer") as caught:
        adapt(lm, "lora", {**OPTIONS["lora"], "target_modules": ["no_such_layer"]})
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ParamsError, match=r"finetune\.bitfit\.parameters: no parameter has nothing in its name"
    ):
        adapt(lm, "bitfit", {"parameters": ["nothing"]})
