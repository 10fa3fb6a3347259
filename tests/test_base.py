"""The stage `base` as it is run, on toy sizes: what it writes, that it survives a kill, and how it refuses."""

import re
import shutil
from pathlib import Path

import pytest
from lm_stages import SCHEDULE_HERE, Workplace, base_section, lay_out
from lm_toys import FAMILIES, OPTIONS, texts, toy

from tasks.base import _verdict
from tasks.lm.model import LanguageModel, save
from tasks.lm.peft import adapt


@pytest.fixture(scope="module", params=FAMILIES)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A finished run of each family."""
    workplace = lay_out(tmp_path_factory.mktemp(request.param))
    workplace.set(base=base_section(request.param))
    said = workplace.run("base")
    assert "far below the 20 that are worth reading" in said
    return workplace


def test_the_model_opens_without_code_of_ours(done: Workplace) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    folder = done.root / "models" / "base"
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = texts(1)[0][:40]
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert len(tokenizer) == model.config.vocab_size == done.metrics("base")["vocabulary"]
    assert ids.shape[1] > 1


def test_it_learns_and_says_how_little_it_read(done: Workplace) -> None:
    metrics = done.metrics("base")
    assert metrics["perplexity_after"] < 0.8 * metrics["perplexity_before"]
    assert metrics["loss_after"] < metrics["loss_before"] - 0.2
    assert metrics["tokens_recommended"] == 20 * metrics["parameters"]
    assert metrics["tokens_per_parameter"] == metrics["tokens_seen"] / metrics["parameters"] < 10
    assert not list((done.root / ".work" / "base").glob("*/checkpoint-*"))


def test_killed_in_training_it_ends_with_the_same_bytes(done: Workplace, tmp_path: Path) -> None:
    again = lay_out(tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(done.root / name, tmp_path)
    again.kill_in_training("base")
    assert not (tmp_path / "models" / "base").exists()
    again.run("base")
    assert again.outputs("base") == done.outputs("base")


def test_without_pretraining_a_scratch_model_stays_random_and_a_folder_is_kept(tmp_path: Path) -> None:
    workplace = lay_out(tmp_path)
    save(toy("llama"), tmp_path / "mine")
    workplace.set(base=base_section("llama", source="mine", pretraining=None))
    workplace.run("base")
    metrics = workplace.metrics("base")
    assert metrics["perplexity_after"] == metrics["perplexity_before"]
    assert (metrics["tokens_seen"], metrics["tokens_per_parameter"]) == (0, 0)
    ours, kept = (tmp_path / folder / "model.safetensors" for folder in ("mine", "models/base"))
    assert ours.read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("source", ["someone/no-such-model", "folders/not-there"])
def test_a_source_that_is_not_there_is_one_line(source: str, tmp_path: Path) -> None:
    workplace = lay_out(tmp_path)
    workplace.set(base=base_section("t5", source=source))
    assert_one_line(workplace.run("base", code=2), f"cannot open the model {source}")


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    workplace = lay_out(tmp_path)
    lm = toy("t5")
    save(lm, tmp_path / "full")
    lm.model.name_or_path = lm.model.config.name_or_path = str(tmp_path / "full")
    save(adapt(LanguageModel(lm.model, lm.tokenizer), "lora", OPTIONS["lora"]), tmp_path / "adapter")
    workplace.set(base=base_section("t5", source="adapter"))
    assert_one_line(
        workplace.run("base", code=2), "base.source: adapter is an adapter; name the full model it belongs to"
    )


def test_too_little_text_for_a_batch_is_one_line(tmp_path: Path) -> None:
    workplace = lay_out(tmp_path, documents=20)
    section = base_section("t5")
    section["pretraining"]["schedule"] = {**SCHEDULE_HERE, "batch_size": 512}
    workplace.set(base=section)
    assert_one_line(workplace.run("base", code=2), "do not fill one batch of 512")


def test_the_verdict_weighs_tokens_against_parameters() -> None:
    assert "1.0 per parameter: far below the 20 that are worth reading" in _verdict("scratch", 100, 100)
    assert _verdict("scratch", 2_000, 100).endswith("20.0 per parameter (worth reading: 20)")
    assert _verdict("gpt2", 2_000, 100) == "base: gpt2 read 2,000 more tokens here"


def assert_one_line(said: str, expected: str) -> None:
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if expected in line]
    assert len(lines) == 1, said
    assert not re.search(r"\s$", lines[0])
