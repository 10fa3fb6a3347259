"""The tokenizer that is learnt here, and the shapes of the models around it."""

from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from lm_toys import ARCHITECTURE, FAMILIES, texts, toy
from pydantic import ValidationError
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tasks.lm.architecture import Architecture
from tasks.lm.model import LanguageModel, save
from tasks.lm.scratch import train_tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return toy(request.param)


def test_corpus_texts_come_back_from_their_tokens(lm: LanguageModel) -> None:
    for text in [*texts(60, seed=9), "Room 512 at 10:45?\n#Person1#: Café, déjà vu — 漢字 😀"]:
        assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1))
@example("<unknown>")
def test_no_text_is_unknown(text: str) -> None:
    tokenizer = train_tokenizer(_architecture("t5"), [], sentinels=4)
    assume(not any(word in text for word in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}))
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_added_tokens_and_digits_stay_whole(lm: LanguageModel) -> None:
    tokens = lm.tokenizer.tokenize("#Person1#: call 2047 now, #Person2#!")
    assert tokens.count("#Person1#") == tokens.count("#Person2#") == 1
    assert [token for token in tokens if token in "0123456789"] == ["2", "0", "4", "7"]
    kept = lm.tokenizer.decode(lm.tokenizer("#Person1# asks")["input_ids"], skip_special_tokens=True)
    assert kept == "#Person1# asks"


def test_a_word_is_the_same_token_at_the_start_of_a_line(lm: LanguageModel) -> None:
    start, inside, line = (
        lm.tokenizer.tokenize(text) for text in ("moving on", "we are moving on", "we\nmoving on")
    )
    assert start == inside[-len(start) :] == line[-len(start) :]


def test_padding_is_not_the_end(lm: LanguageModel) -> None:
    assert lm.tokenizer.pad_token_id != lm.tokenizer.eos_token_id
    config = lm.model.generation_config
    assert (config.pad_token_id, config.eos_token_id) == (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id)
    assert len(lm.tokenizer) == ARCHITECTURE["vocabulary"] == lm.model.config.vocab_size


def test_family_and_shape_follow_the_params() -> None:
    t5, llama = toy("t5", layers=2).model, toy("llama", layers=3).model
    assert (t5.config.num_layers, t5.config.num_decoder_layers, t5.config.is_encoder_decoder) == (2, 2, True)
    assert (llama.config.num_hidden_layers, llama.config.is_encoder_decoder) == (3, False)


def test_an_encoder_begins_by_reading_what_is_near() -> None:
    attention = toy("t5").model.encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(12, 12)[0]  # [heads, reader, read]
    back, ahead = bias[:, 11].flip(1), bias[:, 0]  # from the reader itself to what is 11 tokens away
    assert (back[:3, :8].diff(dim=1) < 0).all()  # heads with a slope: the nearer, the more
    assert (back[3] == 0).all()
    assert (ahead[[0, 2], 1:] <= back[[0, 2], 1:] - 2).all()  # these two look back only
    assert torch.equal(ahead[[1, 3]], back[[1, 3]])


def test_a_causal_model_begins_by_reading_what_is_near() -> None:
    model = toy("llama", layers=2, d_model=128).model
    first, second = (layer.self_attn for layer in model.model.layers)
    positions = torch.arange(12)[None]
    cos, sin = model.model.rotary_emb(first.q_proj.bias, positions)
    queries, keys = (
        projection.bias.view(1, 4, 1, -1).expand(-1, -1, 12, -1) for projection in (first.q_proj, first.k_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    logits = (queries @ keys.mT * first.scaling)[0]  # [heads, reader, read]
    back = logits[:, 11].flip(1)  # from the reader itself to what is 11 tokens behind
    assert back[:, 0].tolist() == pytest.approx([16, 8, 4, 0], abs=1e-4)
    assert (back[:3, :5].diff(dim=1) < 0).all()
    assert (back[:3, 8:] < 0.6 * back[:3, :1]).all()
    assert torch.allclose(logits[:, 5, 3], logits[:, 11, 9], atol=1e-4)
    assert not second.q_proj.bias.any() and not second.k_proj.bias.any()


@pytest.mark.parametrize("width", [8, 16, 24])
def test_heads_of_any_even_size_begin_near(width: int) -> None:
    attention = toy("llama", d_model=width).model.model.layers[0].self_attn
    biases = attention.q_proj.bias.view(4, -1), attention.k_proj.bias.view(4, -1)
    logits = (biases[0] * biases[1]).sum(1) * attention.scaling
    assert logits.tolist() == pytest.approx([16, 8, 4, 0], abs=1e-4)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="d_model 32 is not a multiple of heads 5"):
        _architecture("t5", heads=5)


def test_the_same_corpus_gives_the_same_bytes(tmp_path: Path, lm: LanguageModel) -> None:
    family = "t5" if lm.is_encoder_decoder else "llama"
    save(lm, tmp_path / "one")
    save(toy(family), tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def _architecture(family: str, **changes: object) -> Architecture:
    return Architecture.model_validate({**ARCHITECTURE, "family": family, **changes})
