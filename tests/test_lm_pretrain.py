"""What a base model learns from raw text: gaps that can be filled, texts to continue, and every next token."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_toys import FAMILIES, texts, toy

from tasks.lm.model import LanguageModel
from tasks.lm.pretrain import (
    cut,
    documents,
    objective,
    read_texts,
    sentinel_ids,
    sentinels_needed,
    span_corruption,
)
from tasks.stage import DataError, ParamsError

END = 1
SENTINELS = list(range(1000, 1100))
SETTINGS = {"max_tokens": 64, "corrupted": 0.15, "mean_span": 3.0, "prefix_share": 0.5, "seed": 1}


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return toy(request.param)


@given(
    length=st.integers(min_value=2, max_value=300),
    corrupted=st.floats(min_value=0.05, max_value=0.6),
    mean_span=st.floats(min_value=1, max_value=8),
    seed=st.integers(min_value=0, max_value=99),
)
def test_the_gaps_and_what_was_in_them_make_the_text(
    length: int, corrupted: float, mean_span: float, seed: int
) -> None:
    ids = list(range(10, 10 + length))
    sentinels = list(range(1000, 1400))
    prompt, response = span_corruption(ids, sentinels, END, corrupted, mean_span, np.random.default_rng(seed))
    assert prompt[-1] == response[-1] == END
    assert prompt[0] == ids[0]
    fillings: dict[int, list[int]] = {}
    for token in response[:-1]:
        if token in sentinels:
            fillings[token] = []
        else:
            fillings[next(reversed(fillings))].append(token)
    gaps = [token for token in prompt if token in sentinels]
    assert gaps == sentinels[: len(gaps)]
    assert list(fillings) == [*gaps, sentinels[len(gaps)]]
    assert all(fillings[gap] for gap in gaps)
    assert not fillings[sentinels[len(gaps)]]
    whole = [part for token in prompt[:-1] for part in (fillings[token] if token in sentinels else [token])]
    assert whole == ids
    assert sum(map(len, fillings.values())) == min(max(round(length * corrupted), 1), length - 1)
    assert len(gaps) + 1 <= sentinels_needed(length, corrupted, mean_span)


def test_fifteen_per_cent_goes_in_spans_of_three() -> None:
    generator = np.random.default_rng(0)
    ids = list(range(10, 410))
    lengths, first = [], set()
    for _ in range(200):
        prompt, response = span_corruption(ids, SENTINELS, END, 0.15, 3.0, generator)
        lengths.append(len(response) - 2)
        first.add(prompt.index(1000))
    assert set(lengths) == {60 + 20}
    assert len(first) > 20


def test_every_pair_is_decided_by_its_draw(lm: LanguageModel) -> None:
    corpus = texts(30)
    rows, pair = objective(lm, corpus, **SETTINGS)  # type: ignore[arg-type]
    _, again = objective(lm, corpus, **SETTINGS)  # type: ignore[arg-type]
    draws = range(2 * rows)
    assert [pair(draw) for draw in draws] == [again(draw) for draw in reversed(draws)][::-1]
    assert all(prompt and response for prompt, response in map(pair, draws))
    assert any(pair(row) != pair(row + rows) for row in range(rows))


def test_a_causal_model_reads_the_same_text_whole_or_cut() -> None:
    lm = toy("llama")
    corpus = [*texts(30), "Who comes?\n\nAnna comes.", "A paragraph.\n\nAnother.\n\nA third."]
    parts = documents(lm, corpus, SETTINGS["max_tokens"] - 2)
    assert {part.text is None for part in parts} == {True, False}
    wholes = [[lm.tokenizer.bos_token_id, *part.ids, lm.tokenizer.eos_token_id] for part in parts]
    for share in (0.0, 1.0):
        rows, pair = objective(lm, corpus, **{**SETTINGS, "prefix_share": share})  # type: ignore[arg-type]
        pairs = [pair(row) for row in range(rows)]
        assert [[*prompt, *response] for prompt, response in pairs] == wholes
        assert all((len(prompt) == 1) == (share == 0) for prompt, _ in pairs)
    assert max(map(len, wholes)) <= SETTINGS["max_tokens"]


@pytest.mark.parametrize(("share", "others"), [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_the_share_of_texts_that_are_continued(lm: LanguageModel, share: float, others: float) -> None:
    rows, pair = objective(lm, texts(60), **{**SETTINGS, "prefix_share": share})  # type: ignore[arg-type]
    sentinels = set(sentinel_ids(lm))
    prompts = [pair(draw)[0] for draw in range(10 * rows)]
    found = [bool(sentinels & set(prompt)) or len(prompt) == 1 for prompt in prompts]
    assert sum(found) / len(found) == pytest.approx(others, abs=0.06)


def test_long_texts_are_read_in_parts(lm: LanguageModel) -> None:
    text = " ".join(texts(4))
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = documents(lm, [text, "", texts(1)[0]], max_tokens=40)
    assert [token for part in parts[: -(-len(ids) // 40)] for token in part.ids] == ids
    assert all(1 < len(part.ids) <= 40 for part in parts)


def test_a_text_is_cut_between_paragraphs_or_between_tokens(lm: LanguageModel) -> None:
    end = lm.tokenizer.eos_token_id
    (part,) = documents(lm, ["One two.\n\nThree.\n\nFour five six."], max_tokens=64)
    for where, expected in ((0.0, "One two."), (0.99, "One two.\n\nThree."), (0.4, "One two.")):
        ((prompt, response),) = cut(lm, [part], [where])
        between = "" if lm.is_encoder_decoder else "\n\n"
        assert lm.tokenizer.decode(prompt, skip_special_tokens=True) == expected + between
        rest = lm.tokenizer.decode(response, skip_special_tokens=True)
        assert f"{expected}\n\n{rest}" == part.text
        assert response[-1] == end
    (plain,) = documents(lm, ["One two three four five."], max_tokens=64)
    ((prompt, response),) = cut(lm, [plain], [0.5])
    assert (
        len(plain.ids) // 2 <= len([token for token in prompt if token in plain.ids]) <= len(plain.ids) // 2 + 1
    )


def test_too_few_sentinels_are_one_line() -> None:
    lm = toy("t5")
    corpus = texts(4)
    assert len(sentinel_ids(lm)) == 12
    objective(lm, corpus, **{**SETTINGS, "prefix_share": 1.0, "corrupted": 0.9})  # type: ignore[arg-type]
    with pytest.raises(ParamsError, match="12 sentinel tokens <extra_id_N> in the tokenizer are too few"):
        objective(lm, corpus, **{**SETTINGS, "corrupted": 0.9})  # type: ignore[arg-type]


def test_texts_that_are_missing_or_none_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl is missing; run prepare first"):
        read_texts(tmp_path / "train.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl holds no text"):
        read_texts(tmp_path / "empty.jsonl")
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b")))
    assert read_texts(tmp_path / "two.jsonl") == ["a", "b"]
