"""Models in folders: what is saved is what is opened, and what cannot be opened is one clear line."""

import json
from pathlib import Path

import pytest
import torch
from lm_toys import COMPUTE, FAMILIES, GREEDY, texts, toy

from tasks.lm.model import LanguageModel, is_adapter, load, save
from tasks.lm.respond import respond
from tasks.stage import UserError


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return toy(request.param)


def test_transformers_opens_what_is_saved(lm: LanguageModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    save(lm, tmp_path / "model")
    family = AutoModelForSeq2SeqLM if lm.is_encoder_decoder else AutoModelForCausalLM
    opened = LanguageModel(
        family.from_pretrained(tmp_path / "model").eval(), AutoTokenizer.from_pretrained(tmp_path / "model")
    )
    prompts = texts(4)
    assert respond(opened, prompts, GREEDY, batch_size=4, seed=0) == respond(
        lm, prompts, GREEDY, batch_size=4, seed=0
    )


def test_opened_and_saved_again_the_bytes_are_the_same(lm: LanguageModel, tmp_path: Path) -> None:
    save(lm, tmp_path / "one")
    opened = load(tmp_path / "one", COMPUTE)
    assert not is_adapter(opened)
    assert not opened.model.training
    save(opened, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        if path.name != "tokenizer_config.json":  # transformers notes there that it was opened from a folder
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_nothing_saved_names_a_place(lm: LanguageModel, tmp_path: Path) -> None:
    save(lm, tmp_path / "model")
    for path in (tmp_path / "model").glob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path.name


def test_decoding_settings_of_a_models_own_file_are_left_out(lm: LanguageModel, tmp_path: Path) -> None:
    save(lm, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "do_sample": True, "temperature": 0.3, "num_beams": 4}))
    config = load(tmp_path / "model", COMPUTE).model.generation_config
    assert (config.do_sample, config.temperature, config.num_beams) == (None, None, None)
    assert config.eos_token_id == lm.tokenizer.eos_token_id


def test_a_tokenizer_without_padding_pads_with_its_end(lm: LanguageModel, tmp_path: Path) -> None:
    save(lm, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    opened = load(tmp_path / "model", COMPUTE)
    assert opened.tokenizer.pad_token_id == opened.tokenizer.eos_token_id
    prompts = texts(4)
    assert respond(opened, prompts, GREEDY, batch_size=4, seed=0) == respond(
        opened, prompts, GREEDY, batch_size=1, seed=0
    )


def test_flan_t5_keeps_its_unscaled_output_when_saved_again(tmp_path: Path) -> None:
    """T5 1.1 and FLAN-T5 do not scale the decoder's output; transformers ties their embeddings all the same."""
    lm = toy("t5")
    lm.model.config.scale_decoder_outputs = False
    save(lm, tmp_path / "model")
    opened = load(tmp_path / "model", COMPUTE)
    assert opened.model.config.scale_decoder_outputs is False
    prompts = texts(4)
    assert respond(opened, prompts, GREEDY, batch_size=4, seed=0) == respond(
        lm, prompts, GREEDY, batch_size=4, seed=0
    )


def test_precision_is_that_of_compute_unless_the_model_is_to_be_trained(tmp_path: Path) -> None:
    save(toy("llama"), tmp_path / "model")
    half = COMPUTE.model_copy(update={"precision": "bf16"})
    assert load(tmp_path / "model", half).model.dtype == torch.bfloat16
    assert load(tmp_path / "model", half, trainable=True).model.dtype == torch.float32


@pytest.mark.parametrize("name", ["models/nothing-here", "someone/no-such-model"])
def test_a_model_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"cannot open the model {name}") as caught:
        load(name, COMPUTE)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    lm = toy("llama")
    save(lm, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(lm.model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot open the model"):
        load(tmp_path / "model", COMPUTE)


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = toy("llama")
    save(lm, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(lm.tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save(toy("llama", seed=1), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
