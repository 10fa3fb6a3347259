"""Text classifiers: the same scores after saving, in a plain library, and whatever else is in the batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from classifier_toys import ANSWERS, KINDS, LORA, PROMPTS, lay_model, toy_classifier
from lm_toys import COMPUTE, FAMILIES, OPTIONS, shake, toy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from tasks.lm.classifier import (
    Classifier,
    load_classifier,
    new_classifier,
    output_layer,
    save_classifier,
    scores,
    with_lora,
)
from tasks.lm.collate import encode_prompts, encode_responses
from tasks.lm.model import LanguageModel, load, save
from tasks.lm.peft import adapt, merged
from tasks.lm.respond import likelihoods
from tasks.stage import ParamsError, UserError


@pytest.fixture(params=KINDS)
def classifier(request: pytest.FixtureRequest, tmp_path: Path) -> Classifier:
    return toy_classifier(request.param, tmp_path / "start")


def scored(classifier: Classifier, batch_size: int = 8) -> list[float]:
    found = scores(classifier, PROMPTS, ANSWERS, batch_size=batch_size)
    assert max(found) - min(found) > 0.01
    return found


def trained(classifier: Classifier) -> Classifier:
    shake(LanguageModel(classifier.model, classifier.tokenizer))
    classifier.model.eval()
    return classifier


@pytest.mark.parametrize("method", ["full", "lora"])
def test_saved_and_opened_it_scores_the_same(classifier: Classifier, method: str, tmp_path: Path) -> None:
    fresh = scored(classifier)
    if method == "lora":
        classifier = with_lora(classifier, LORA)
    tuned = trained(classifier).with_limits(40, 12).shifted(0.7)
    before = scored(tuned)
    assert before != pytest.approx(fresh, abs=0.01)
    save_classifier(tuned, tmp_path / "saved")
    again = load_classifier(tmp_path / "saved", COMPUTE)
    assert scored(again) == pytest.approx(before, abs=1e-5)
    assert (again.max_prompt_tokens, again.max_answer_tokens) == (40, 12)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_plain_transformers_gives_the_same_score(classifier: Classifier, method: str, tmp_path: Path) -> None:
    """Called with what `encode` gives, padded as a plain call needs it."""
    if method == "lora":
        classifier = with_lora(classifier, LORA)
    tuned = trained(classifier)
    ours = scored(tuned)
    save_classifier(tuned, tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    encoded = load_classifier(tmp_path / "saved", COMPUTE).encode(PROMPTS, ANSWERS)
    for text, expected in zip(encoded, ours, strict=True):
        match tuned.family:
            case "seq2seq":
                width = max(len(text.prompt), len(text.answer) + 1)
                prompt, prompt_mask = left([*text.prompt], width)
                answer, answer_mask = left([model.config.decoder_start_token_id, *text.answer], width)
                inputs = {
                    "input_ids": prompt,
                    "attention_mask": prompt_mask,
                    "decoder_input_ids": answer,
                    "decoder_attention_mask": answer_mask,
                }
            case "causal":
                inputs = {"input_ids": torch.tensor([[*text.prompt, *text.answer]])}
            case _:
                inputs = {
                    "input_ids": torch.tensor([text.answer]),
                    "token_type_ids": torch.tensor([text.kinds]),
                }
        with torch.inference_mode():
            assert model(**inputs).logits.item() == pytest.approx(expected, abs=1e-5)


def left(ids: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    gap = width - len(ids)
    return torch.tensor([[0] * gap + ids]), torch.tensor([[0] * gap + [1] * len(ids)])


def test_an_encoder_reads_the_pair_as_its_tokenizer_writes_it(tmp_path: Path) -> None:
    bert = toy_classifier("bert", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        plain = bert.model(**tokenizer(PROMPTS, ANSWERS, padding=True, return_tensors="pt")).logits[:, 0]
    assert scored(bert) == pytest.approx(plain.tolist(), abs=1e-5)


def test_neighbours_padding_and_order_change_nothing(classifier: Classifier) -> None:
    alone = scored(classifier, batch_size=1)
    assert scored(classifier) == pytest.approx(alone, abs=1e-5)
    long = [*PROMPTS, " ".join(PROMPTS * 5)], [*ANSWERS, " ".join(ANSWERS * 3)]
    assert scores(classifier, *long, batch_size=4)[:3] == pytest.approx(alone, abs=1e-5)
    backwards = scores(classifier, PROMPTS[::-1], ANSWERS[::-1], batch_size=3)
    assert backwards[::-1] == pytest.approx(alone, abs=1e-5)


def test_a_prompt_is_read_once_for_all_its_answers(tmp_path: Path) -> None:
    t5, llama = (toy_classifier(family, tmp_path / family) for family in FAMILIES)
    assert len(set(PROMPTS)) == 2
    assert len(t5.collate(t5.encode(PROMPTS, ANSWERS))["prompt_ids"]) == 2
    assert len(llama.collate(llama.encode(PROMPTS, ANSWERS))["answer_ids"]) == 2


@pytest.mark.parametrize(
    "other", [{"sliding_window": 4096}, {"layer_types": ["linear_attention", "full_attention"]}]
)
def test_a_causal_model_whose_attention_is_not_whole_reads_each_answer_by_itself(
    other: dict[str, object], tmp_path: Path
) -> None:
    """As it does where positions are not rotary; with the same scores, and likelihoods."""
    llama = new_classifier(lay_model("llama", tmp_path / "start"), COMPUTE, likelihood=2.0)
    together = scored(trained(llama))
    for name, value in other.items():
        setattr(llama.model.config, name, value)
    assert len(llama.collate(llama.encode(PROMPTS, ANSWERS))["answer_ids"]) == 3
    assert scored(llama) == pytest.approx(together, abs=1e-5)


def test_the_answer_and_the_prompt_both_count(classifier: Classifier) -> None:
    one, other_answer, other_prompt = scores(
        classifier, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], [ANSWERS[0], ANSWERS[1], ANSWERS[0]], batch_size=3
    )
    assert abs(one - other_answer) > 1e-3
    assert abs(one - other_prompt) > 1e-3


def by_hand(folder: Path) -> list[float]:
    """The mean log-likelihood of each answer, from the language model itself."""
    lm = load(folder, COMPUTE)
    prompts, answers = encode_prompts(lm, PROMPTS), encode_responses(lm, ANSWERS, None)
    return [-found.nll / found.tokens for found in likelihoods(lm, prompts, answers, batch_size=1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_likelihood_of_the_answer_is_added(family: str, adapted: bool, tmp_path: Path) -> None:
    folder = lay_model(family, tmp_path / "start")
    if adapted:
        lm = adapt(toy(family), "lora", OPTIONS["lora"])
        lm.model.peft_config["default"].base_model_name_or_path = str(folder)
        shake(lm)
        folder = tmp_path / "adapter"
        save(lm, folder)
    torch.manual_seed(1)
    plain = new_classifier(folder, COMPUTE)
    torch.manual_seed(1)
    aided = new_classifier(folder, COMPUTE, likelihood=2.0)
    for each in (plain, aided):
        each.model.eval()
    added = [score - bare for score, bare in zip(scored(aided), scored(plain), strict=True)]
    assert added == pytest.approx([2 * value for value in by_hand(folder)], abs=1e-4)
    assert scored(aided, batch_size=1) == pytest.approx(scored(aided), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_opened_it_still_adds_the_likelihood(family: str, tmp_path: Path) -> None:
    aided = new_classifier(lay_model(family, tmp_path / "start"), COMPUTE, likelihood=2.0)
    tuned = trained(with_lora(aided, LORA))
    before = scored(tuned)
    save_classifier(tuned, tmp_path / "saved")
    assert scored(load_classifier(tmp_path / "saved", COMPUTE)) == pytest.approx(before, abs=1e-4)
    assert scored(replace(tuned, language_head=None)) != pytest.approx(before, abs=0.01)


def test_a_shift_lowers_every_score(classifier: Classifier) -> None:
    before = scored(classifier)
    after = scored(classifier.shifted(0.7).shifted(-0.2))
    assert after == pytest.approx([value - 0.5 for value in before], abs=1e-5)


def test_longer_texts_are_cut(classifier: Classifier) -> None:
    limited = classifier.with_limits(6, 5)
    for text in limited.encode([" ".join(PROMPTS)], [" ".join(ANSWERS)]):
        assert len(text) == 11
        assert len(text.prompt) in (0, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_from_a_language_model_with_its_adapter_merged_in(family: str, tmp_path: Path) -> None:
    save(toy(family), tmp_path / "base")
    lm = adapt(toy(family), "lora", OPTIONS["lora"])
    lm.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    shake(lm)
    save(lm, tmp_path / "adapter")
    found = new_classifier(tmp_path / "adapter", COMPUTE).bare.base_model.state_dict()
    expected = merged(lm).model.base_model.state_dict()
    untuned = new_classifier(tmp_path / "base", COMPUTE).bare.base_model.state_dict()
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in found.items())
    assert not all(torch.equal(tensor, untuned[name]) for name, tensor in found.items())


def test_a_new_head_is_drawn_from_the_seed_at_the_width_of_the_paper(tmp_path: Path) -> None:
    first, again = (toy_classifier("t5", tmp_path) for _ in range(2))
    weight = output_layer(first.bare).weight
    assert torch.equal(weight, output_layer(again.bare).weight)
    assert weight.std().item() == pytest.approx((32 + 1) ** -0.5, rel=0.3)


def labelled(folder: Path) -> Path:
    """A classifier of three labels, with its tokenizer."""
    lay_model("bert", folder)
    names = {0: "fine", 1: "rude", 2: "spam"}
    model = BertForSequenceClassification.from_pretrained(
        folder, num_labels=3, id2label=names, label2id={name: place for place, name in names.items()}
    )
    model.save_pretrained(folder)
    return folder


def test_a_classifier_of_several_labels_can_begin_a_reward_model(tmp_path: Path) -> None:
    found = new_classifier(labelled(tmp_path), COMPUTE)
    assert len(scored(found)) == len(ANSWERS)
    assert found.model.config.num_labels == 1


def test_a_label_is_scored_on_the_answer_alone(tmp_path: Path) -> None:
    found = load_classifier(labelled(tmp_path), COMPUTE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        plain = found.model(**tokenizer(ANSWERS, padding=True, return_tensors="pt")).logits[:, 1]
    for prompts in (PROMPTS, PROMPTS[::-1]):
        rude = scores(found, prompts, ANSWERS, batch_size=2, label="rude")
        assert rude == pytest.approx(plain.tolist(), abs=1e-5)


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    three = load_classifier(labelled(tmp_path / "labels"), COMPUTE)
    with pytest.raises(ParamsError, match="has 3 outputs: name one as label, fine or rude or spam"):
        scores(three, PROMPTS, ANSWERS, batch_size=2)
    with pytest.raises(ParamsError, match="has no label toxic; it has fine or rude or spam"):
        scores(three, PROMPTS, ANSWERS, batch_size=2, label="toxic")
    for open_it in (load_classifier, new_classifier):
        with pytest.raises(UserError, match=r"cannot open the classifier .*nowhere") as caught:
            open_it(tmp_path / "nowhere", COMPUTE)
        assert "\n" not in str(caught.value)
    for family in FAMILIES:
        lay_model(family, tmp_path / family)
        with pytest.raises(UserError, match=f"{family} is no classifier: it has no "):
            load_classifier(tmp_path / family, COMPUTE)
    with pytest.raises(ParamsError, match=r"likelihood 2\.0: the encoder .*bert tells none; set it to 0"):
        new_classifier(lay_model("bert", tmp_path / "bert"), COMPUTE, likelihood=2.0)
    with pytest.raises(ParamsError, match=r"lora on t5 with target_modules \['nowhere'\]: No modules"):
        with_lora(toy_classifier("t5", tmp_path / "toy"), {**LORA, "target_modules": ["nowhere"]})
