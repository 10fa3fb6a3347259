"""The stage `quantize` on toy sizes: what it writes is small, opens plainly, and answers as was measured."""

import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_host
import pytest
import torch
from lm_stages import SCHEDULE_HERE, lay_out
from lm_toys import COMPUTE, FAMILIES, GREEDY, context, schedule, shake, toy
from pydantic import ValidationError

from tasks.compress import formats
from tasks.compress.kernels import Int8Linear, load_int8
from tasks.compress.quantization import from_integers, scales, to_integers
from tasks.compress.quantized_training import divergence, train_rounded
from tasks.compress.schemes import BITS, WITH_BITSANDBYTES
from tasks.compress.smoothing import observe, smooth
from tasks.compress.speed import speed
from tasks.data.synthetic import examples as synthetic
from tasks.lm.collate import collate, encode_prompts, encode_responses
from tasks.lm.model import LanguageModel, load, save
from tasks.lm.peft import adapt
from tasks.lm.respond import respond, response_logits
from tasks.quantize import Params, quantize
from tasks.stage import DataError, ParamsError, UserError

SCHEMES = (*BITS, *WITH_BITSANDBYTES)
WIDE = {"d_model": 64, "d_ff": 128, "heads": 2}


def section(**changes: Any) -> dict[str, Any]:
    return {
        "source": "models/ppo",
        "scheme": "int8",
        "compared": ["int8", "int8_dynamic", "int4", "int4_qat", "nf4"],
        "group_size": 16,
        "smoothing": {"examples": 4, "strength": 0.5},
        "training": {"examples": 16, "learning_rate": 0.001, "schedule": SCHEDULE_HERE},
        "task": "summarize",
        "prompts": 6,
        "max_prompt_tokens": 96,
        "max_response_tokens": 8,
        "batch_size": 8,
        "toxicity": {"backend": "oracle"},
        "timing": {"batch_sizes": [1, 2], "new_tokens": 2, "repeats": 1},
        "bootstrap_samples": 50,
        "shown": 2,
        **changes,
    }


def calm(family: str) -> LanguageModel:
    """A toy model in which an error does not grow from layer to layer."""
    lm = toy(family, **WIDE)
    with torch.no_grad():
        for layer in formats.quantizable(lm.model).values():
            layer.weight.div_(4)
    return lm


def some_pairs(lm: LanguageModel, count: int = 6) -> list[Any]:
    rows = list(synthetic(3, count))[:count]
    prompts = encode_prompts(lm, [row.prompt for row in rows], 96)
    return list(zip(prompts, encode_responses(lm, [row.reference for row in rows]), strict=True))


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return response_logits(lm, collate(lm, *zip(*some_pairs(lm), strict=True)))


def written(scheme: str, family: str, root: Path) -> tuple[LanguageModel, Path]:
    """A toy model, and the folder with it in a scheme."""
    lm = calm(family)
    save(lm, root / "dense")
    folder = root / scheme
    if scheme in BITS:
        formats.save_integers(lm, folder, BITS[scheme], None if scheme == "int8" else 16)
    else:
        formats.save_with_bitsandbytes(root / "dense", folder, scheme, COMPUTE)  # type: ignore[arg-type]
    return lm, folder


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int8", "int4", "int8_dynamic", "nf4"])
def test_what_is_written_is_small_and_opens_to_the_same_logits_every_time(
    scheme: str, family: str, tmp_path: Path
) -> None:
    lm, folder = written(scheme, family, tmp_path)
    opened, again = load(folder, COMPUTE), load(folder, COMPUTE)
    assert torch.equal(logits(opened), logits(again))
    error = (logits(opened) - logits(lm)).norm() / logits(lm).norm()
    assert 0 < error < (0.05 if scheme.startswith("int8") else 0.5)
    layers = sum(layer.weight.numel() for layer in formats.quantizable(lm.model).values())
    saved = weights_bytes(tmp_path / "dense") - weights_bytes(folder)
    assert saved > layers * (2 if scheme.startswith("int8") else 2.4) * (
        0.5 if scheme in WITH_BITSANDBYTES else 1
    )
    _, twice = written(scheme, family, tmp_path / "twice")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in twice.iterdir()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_opened_weights_are_those_of_the_equations(scheme: str, family: str, tmp_path: Path) -> None:
    lm, folder = written(scheme, family, tmp_path)
    opened = formats.quantizable(load(folder, COMPUTE).model)
    for name, layer in formats.quantizable(lm.model).items():
        scale = scales(layer.weight, BITS[scheme], None if scheme == "int8" else 16)
        expected = from_integers(to_integers(layer.weight, scale, BITS[scheme]), scale)
        torch.testing.assert_close(opened[name].weight, expected)


def test_four_bits_are_packed_to_half_a_byte(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    lm, folder = written("int4", "t5", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name, layer in formats.quantizable(lm.model).items():
        packed, scale = (tensors[f"{name}.weight_{part}"] for part in ("packed", "scale"))
        assert packed.nbytes == layer.weight.numel() / 2
        assert scale.shape == (layer.out_features, layer.in_features / 16)


def test_nf4_takes_four_bits_and_an_eighth_for_its_scales(tmp_path: Path) -> None:
    """A byte of scale for 64 weights and a float32 for 256 of these: 4 + 8/64 + 32/(64·256) = 4.127 bits."""
    import bitsandbytes as bnb

    weight = torch.randn(1024, 1024)
    quantised = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, requires_grad=False).to(
        "cpu"
    )
    state = quantised.quant_state
    scales_bits = 8 * (state.absmax.nbytes + state.state2.absmax.nbytes)
    assert (8 * quantised.data.nbytes + scales_bits) / weight.numel() == pytest.approx(4.127, abs=1e-3)
    once = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=False, requires_grad=False).to("cpu")
    assert 8 * (once.data.nbytes + once.quant_state.absmax.nbytes) / weight.numel() == 4.5


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_evens_out_what_is_hard_and_changes_no_answer(family: str) -> None:
    lm = toy(family)
    pairs = some_pairs(lm)
    batch = collate(lm, *zip(*pairs, strict=True))
    norm = next(iter(observe(lm, [batch])))
    with torch.no_grad():
        norm.weight[3] *= 50  # type: ignore[index]
    before, peak = logits(lm), peaks(observe(lm, [batch])[norm].largest)
    assert smooth(lm, pairs, 0.5, batch_size=3) >= 2
    torch.testing.assert_close(logits(lm), before, rtol=1e-3, atol=1e-3)
    assert peaks(observe(lm, [batch])[norm].largest) < peak / 3


def peaks(largest: torch.Tensor) -> float:
    return float(largest.max() / largest.median())


def test_a_norm_with_other_readers_is_refused() -> None:
    lm = toy("llama")
    layer = lm.model.model.layers[0]
    read = layer.input_layernorm.forward
    layer.register_forward_hook(lambda module, inputs, output: output + read(inputs[0]))
    with pytest.raises(ParamsError, match=r"quantize.smoothing does not fit llama: .*; set it to null"):
        smooth(lm, some_pairs(lm), 0.5, batch_size=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_with_rounded_weights_rounds_as_the_folder_does(family: str, tmp_path: Path) -> None:
    lm, folder = written("int4", family, tmp_path)
    dense = logits(lm)
    with formats.fake_quantization(lm.model, 4, 16):
        torch.testing.assert_close(logits(lm), logits(load(folder, COMPUTE)), rtol=1e-4, atol=1e-4)
        loss = response_logits(lm, collate(lm, *zip(*some_pairs(lm), strict=True))).square().mean()
        loss.backward()
    assert all(layer.weight.grad is not None for layer in formats.quantizable(lm.model).values())
    assert torch.equal(logits(lm), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_kernels_answer_like_the_folder_and_keep_no_dense_weights(family: str, tmp_path: Path) -> None:
    lm, folder = written("int8", family, tmp_path)
    quick = load_int8(folder, COMPUTE)
    layers = [module for module in quick.model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == len(formats.quantizable(lm.model))
    opened = logits(load(folder, COMPUTE))
    assert (logits(quick) - opened).norm() / opened.norm() < 0.1
    assert len(respond(quick, ["Who?", "Where was it?"], GREEDY, batch_size=2, seed=1)) == 2
    assert not formats.quantizable(quick.model)
    assert speed(quick, [[5, 6, 7]], batch_size=2, new_tokens=2, repeats=1).tokens_per_second > 0


def test_int8_kernels_refuse_other_folders(tmp_path: Path) -> None:
    _, folder = written("int4", "llama", tmp_path)
    with pytest.raises(UserError, match="has groups of weights; int8 kernels want a scale for each row"):
        load_int8(folder, COMPUTE)
    with pytest.raises(UserError, match="holds no int8 weights; run quantize with scheme: int8"):
        load_int8(tmp_path / "dense", COMPUTE)


@dataclass(frozen=True)
class Place:
    """Data, a toy model to quantise, and what the stage wrote beside it."""

    root: Path

    def quantize(self, **changes: Any) -> Mapping[str, Any]:
        data, source = self.root / "data" / "examples", str(self.root / "models" / "ppo")
        return quantize(
            Params(**section(**{"source": source, **changes})),
            data / "train.jsonl",
            data / "validation.jsonl",
            self.root / "models" / "quantize",
            self.root / "reports" / "quantize",
            context(self.root, "quantize"),
        )

    def outputs(self) -> dict[str, bytes]:
        files = [
            *(self.root / "models" / "quantize").iterdir(),
            *(self.root / "reports" / "quantize").iterdir(),
        ]
        return {file.name: file.read_bytes() for file in files}


def ground(root: Path, family: str) -> Place:
    lay_out(root)
    save(calm(family), root / "models" / "ppo")
    return Place(root)


@pytest.fixture(scope="module", params=FAMILIES)
def done(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Place, Mapping[str, Any]]:
    """A finished run of each family, and its metrics."""
    place = ground(tmp_path_factory.mktemp(request.param), request.param)
    return place, place.quantize()


def test_it_tells_what_each_scheme_costs(done: tuple[Place, Mapping[str, Any]]) -> None:
    place, metrics = done
    assert set(metrics["schemes"]) == {"dense", *SCHEMES}
    dense = metrics["schemes"]["dense"]
    assert (dense["bytes_ratio"], dense["same_answers"]) == (1, 1)
    for name, row in metrics["schemes"].items():
        assert row["bytes_ratio"] == row["bytes"] / dense["bytes"]
        assert 0 <= row["rougeL_low"] <= row["rougeL"] <= row["rougeL_high"] <= 1, name
        assert math.log(row["perplexity"]) == pytest.approx(math.log(dense["perplexity"]), rel=0.1), name
    assert metrics["bytes"] == weights_bytes(place.root / "models" / "quantize")
    assert metrics["bytes_dense"] == weights_bytes(place.root / "models" / "ppo")
    assert metrics["rougeL_loss"] == pytest.approx(metrics["rougeL_dense"] - metrics["rougeL"], abs=1e-6)
    reports = place.root / "reports" / "quantize"
    assert {path.name for path in reports.iterdir()} == {"schemes.csv", "summary.md"}
    assert len((reports / "schemes.csv").read_text().splitlines()) == 7
    assert not list((place.root / "work").iterdir())


def test_again_it_writes_the_same_bytes(done: tuple[Place, Mapping[str, Any]], tmp_path: Path) -> None:
    place, metrics = done
    for name in ("data", "models/ppo"):
        shutil.copytree(place.root / name, tmp_path / name)
    again = Place(tmp_path)
    assert again.quantize() == metrics
    assert again.outputs() == place.outputs()


def test_the_model_opens_without_code_of_ours(done: tuple[Place, Mapping[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "opens.py").write_text("""
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
seq2seq = AutoConfig.from_pretrained(sys.argv[1]).is_encoder_decoder
model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(sys.argv[1])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("Who was it?", return_tensors="pt").input_ids
print(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist(), "tasks" in sys.modules)
""")
    folder = done[0].root / "models" / "quantize"
    ran = command_host.run([sys.executable, "-m", "opens", str(folder)], tmp_path, os.environ)
    assert ran.returncode == 0, ran.stderr
    lm = load(folder, COMPUTE)
    ids = lm.tokenizer("Who was it?", return_tensors="pt").input_ids
    expected = lm.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert ran.stdout.splitlines()[-1] == f"{expected.tolist()} False"


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_with_rounding_four_bits_come_nearer_to_the_dense_model(family: str, tmp_path: Path) -> None:
    lm, dense = calm(family), calm(family)
    pairs = some_pairs(lm, 24)
    batch = collate(lm, *zip(*pairs, strict=True))

    def distance() -> float:
        with torch.inference_mode(), formats.fake_quantization(lm.model, 4, 64):
            return float(
                divergence(response_logits(dense, batch), response_logits(lm, batch), batch.response_mask == 1)
            )

    before = distance()
    given = schedule(epochs=8, batch_size=8)
    train_rounded(lm, pairs, pairs[:4], 4, 64, given, 0.0003, context(tmp_path, "quantize"))
    assert distance() < 0.9 * before
    assert type(next(iter(formats.quantizable(lm.model).values()))) is torch.nn.Linear


def test_a_model_diverges_from_itself_nowhere_and_padding_counts_nothing() -> None:
    logits, other = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert float(divergence(logits, logits, mask)) == pytest.approx(0, abs=1e-6)
    expected = sum(
        float((p.exp() * (p - q)).sum())
        for p, q in zip(logits.log_softmax(-1)[mask], other.log_softmax(-1)[mask], strict=True)
    )
    assert float(divergence(logits, other, mask)) == pytest.approx(expected, rel=1e-4)


def test_an_adapter_is_merged_first(tmp_path: Path) -> None:
    lay_out(tmp_path)
    save(calm("llama"), tmp_path / "models" / "base")
    base = load(tmp_path / "models" / "base", COMPUTE, trainable=True)
    tuned = adapt(base, "lora", {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": None})
    shake(tuned, 0.01)
    save(tuned, tmp_path / "models" / "ppo")
    Place(tmp_path).quantize(compared=["int8"])
    opened = load(tmp_path / "models" / "quantize", COMPUTE)
    tuned.model.eval()
    assert (logits(opened) - logits(tuned)).norm() / logits(tuned).norm() < 0.05


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    place = ground(tmp_path, "t5")
    wrong: list[tuple[dict[str, Any], type[UserError], str]] = [
        (
            {"group_size": 48, "compared": ["int8", "int4"]},
            ParamsError,
            "group_size is 48, which does not divide",
        ),
        ({"task": "translate"}, DataError, "quantize.task is translate, but .* has no example of it"),
        ({"source": "models/none"}, UserError, "cannot open the model models/none"),
    ]
    for changes, kind, said in wrong:
        with pytest.raises(kind, match=said) as caught:
            place.quantize(**changes)
        assert "\n" not in str(caught.value)


def test_a_scheme_that_is_not_compared_cannot_be_kept() -> None:
    with pytest.raises(ValidationError, match=r"scheme is nf4, which is not compared \(int8\)"):
        Params(**section(scheme="nf4", compared=["int8"]))
    with pytest.raises(ValidationError, match="compared names a scheme twice: int8, int8"):
        Params(**section(compared=["int8", "int8"]))


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    paths = [tmp_path / name for name in ("train", "validation", "model", "reports")]
    with pytest.raises(
        ParamsError, match=r"int8_dynamic needs bitsandbytes; install it .* or take int8_dynamic out"
    ):
        quantize(Params(**section()), *paths, context(tmp_path))
