"""What the page of `lifecycle chat` shows: distributions that `generate` draws from, settings, answers."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_toys import COMPUTE, FAMILIES, toy
from playground_toys import HOSTILE, lay_out
from transformers import GenerationConfig

from tasks.data.records import read_examples
from tasks.evaluate import _draw_shots, shot_prompts
from tasks.lm.collate import collate, encode_prompts
from tasks.lm.model import LanguageModel, load
from tasks.lm.respond import respond
from tasks.playground import picture
from tasks.playground.answering import Answer, Playground, Variant, open_playground, pieces
from tasks.playground.distribution import Before, Step, rows, steps
from tasks.playground.settings import SETTINGS, check, first_values
from tasks.stage import UserError

ROOT = Path(__file__).parents[1]
PROMPT = "#Person1#: Hello there, how are you?"
NEUTRAL = {setting.name: setting.neutral for setting in SETTINGS}


def asked(strategy: str = "Greedy", **values: Any) -> Any:
    return check(strategy, {**NEUTRAL, "max_new_tokens": 6, **values})


# --- the distribution


ASKED = {
    "greedy": ("Greedy", {}),
    "penalties": ("Greedy", {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1, "min_new_tokens": 4}),
    "plain sampling": ("Sampling", {}),
    "temperature": ("Sampling", {"temperature": 0.6}),
    "top-k": ("Sampling", {"top_k": 5}),
    "top-p": ("Sampling", {"top_p": 0.7}),
    "min-p": ("Sampling", {"min_p": 0.2}),
    "all": (
        "Sampling",
        {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2,
         "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return toy(request.param)


def generated(lm: LanguageModel, settings: Any) -> tuple[list[int], list[torch.Tensor], list[torch.Tensor]]:
    """Ids of an answer, and the logits and scores `[V]` of each that generate reports."""
    prompt = collate(lm, encode_prompts(lm, [PROMPT]), [[]])
    torch.manual_seed(settings.seed)
    found = lm.model.generate(
        input_ids=prompt.prompt_ids,
        attention_mask=prompt.prompt_mask,
        generation_config=GenerationConfig(
            **settings.generation(), output_logits=True, output_scores=True, return_dict_in_generate=True
        ),
    )
    start = 1 if lm.is_encoder_decoder else prompt.prompt_ids.shape[1]
    return found.sequences[0, start:].tolist(), [e[0] for e in found.logits], [e[0] for e in found.scores]


def before(lm: LanguageModel, ids: list[int], position: int) -> Before:
    start = (
        [lm.model.config.decoder_start_token_id] if lm.is_encoder_decoder else encode_prompts(lm, [PROMPT])[0]
    )
    return Before([*start, *ids[:position]], position)


@pytest.mark.parametrize("name", ASKED)
def test_the_last_step_is_what_generate_draws_from(lm: LanguageModel, name: str) -> None:
    strategy, values = ASKED[name]
    settings = asked(strategy, **values)
    ids, logits, scores = generated(lm, settings)
    assert len(ids) > 1
    for position in range(len(ids)):
        found = steps(logits[position].float(), before(lm, ids, position), settings, lm.model.generation_config)
        torch.testing.assert_close(found[0].probabilities, logits[position].float().softmax(dim=-1))
        torch.testing.assert_close(found[-1].scores, scores[position])
        assert found[-1].kept[ids[position]]


def test_forced_tokens_are_steps_too() -> None:
    lm = toy("t5")
    lm.model.generation_config.forced_bos_token_id = 7
    lm.model.generation_config.forced_eos_token_id = lm.tokenizer.eos_token_id
    settings = asked("Sampling", temperature=2.0, max_new_tokens=3, min_new_tokens=2)
    ids, logits, scores = generated(lm, settings)
    for position in range(len(ids)):
        found = steps(logits[position].float(), before(lm, ids, position), settings, lm.model.generation_config)
        torch.testing.assert_close(found[-1].probabilities, scores[position].softmax(dim=-1))
    assert (ids[0], ids[-1]) == (7, lm.tokenizer.eos_token_id)


def test_beam_search_applies_settings_to_log_probabilities(lm: LanguageModel) -> None:
    settings = asked("Beam search", repetition_penalty=1.4, num_beams=2)
    _, logits, _ = generated(lm, settings)
    ids = lm.model.generation_config
    found = steps(logits[0].float(), before(lm, [], 0), settings, ids)
    expected = logits[0].float().log_softmax(dim=-1)
    seen = torch.tensor(before(lm, [], 0).ids).unique()
    expected[seen] *= 1.4
    torch.testing.assert_close(found[-1].scores, expected)


def test_each_setting_is_a_column_and_off_ones_are_not() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    ids = GenerationConfig(eos_token_id=4)
    settings = asked("Sampling", temperature=0.5, top_k=3, top_p=0.9)
    found = steps(logits, Before([0], 0), settings, ids)
    assert [step.name for step in found] == ["what the model says", "temperature 0.5", "top-k 3", "top-p 0.9"]
    assert [int(step.kept.sum()) for step in found] == [5, 5, 3, 2]
    assert found[1].entropy < found[0].entropy
    assert found[0].entropy == pytest.approx(-sum(p * math.log(p) for p in found[0].probabilities.tolist()))
    assert [step.name for step in steps(logits, Before([0], 0), asked(), ids)] == ["what the model says"]


def test_rows_hold_the_likeliest_tokens_the_chosen_one_and_the_rest() -> None:
    found = [
        Step("raw", torch.tensor([1.0, 3.0, 2.0, 0.0])),
        Step("cut", torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf])),
    ]
    table, rest = rows(found, chosen=0, count=2)
    assert [(row.token, row.chosen) for row in table] == [(1, False), (2, False), (0, True)]
    assert table[2].probabilities[1] is None
    assert rest.tokens == 1
    for column in range(2):
        whole = sum(row.probabilities[column] or 0.0 for row in table) + rest.probabilities[column]
        assert whole == pytest.approx(1.0)


# --- settings


@pytest.mark.parametrize(
    ("strategy", "values", "words"),
    [
        ("Sampling", {"temperature": 0}, "temperature is 0; it must be a number from 0.05 to 3"),
        ("Sampling", {"top_p": 0}, "top_p is 0; it must be a number above 0, up to 1"),
        ("Sampling", {"top_k": 2.5}, "top_k is 2.5; it must be a whole number from 0 to 100"),
        ("Sampling", {"seed": -1}, "seed is -1; it must be a whole number from 0 to 4,294,967,295"),
        ("Sampling", {"temperature": math.nan}, "temperature is nan; it must be"),
        (
            "Greedy",
            {"max_new_tokens": None},
            "max_new_tokens is empty; it must be a whole number from 1 to 2,048",
        ),
        ("Greedy", {"max_new_tokens": "many"}, "max_new_tokens is 'many'; it must be"),
        ("Greedy", {"max_new_tokens": 3, "min_new_tokens": 5}, "lower the first or raise the second"),
        ("Beam search", {"num_beams": 1}, "num_beams is 1; it must be a whole number from 2 to 16"),
        ("Guessing", {}, "it must be one of Greedy, Sampling, Beam search"),
    ],
)
def test_a_wrong_setting_is_named_with_what_it_may_be(
    strategy: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        asked(strategy, **values)


def test_settings_of_other_strategies_are_not_looked_at() -> None:
    assert asked("Greedy", temperature=None, num_beams=-1).generation() == {
        "do_sample": False, "num_beams": 1, "max_new_tokens": 6,
    }  # fmt: skip


@pytest.mark.parametrize("strategy", ["Greedy", "Sampling", "Beam search"])
def test_what_generate_is_told_contradicts_nothing(strategy: str) -> None:
    everything = asked(strategy, **{s.name: s.high for s in SETTINGS if s.name not in ("min_p", "top_p")})
    GenerationConfig(**everything.generation()).validate(strict=True)


def test_the_page_begins_with_the_settings_of_the_evaluation() -> None:
    assert first_values({"do_sample": False, "num_beams": 1, "max_new_tokens": 40})[0] == "Greedy"
    strategy, values = first_values({"do_sample": True, "temperature": 0.7, "max_new_tokens": 9})
    assert (strategy, values["temperature"], values["max_new_tokens"]) == ("Sampling", 0.7, 9)
    strategy, values = first_values({"num_beams": 3})
    assert (strategy, values["num_beams"]) == ("Beam search", 3)


# --- answering


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("playground"))


@pytest.fixture(scope="module")
def playground(root: Path) -> Playground:
    return open_playground(root, {})


def test_variants_are_those_of_the_evaluation_whose_folder_is_there(playground: Playground) -> None:
    assert list(playground.variants) == ["base", "base_one_shot", "base_few_shot", "finetune", "ppo"]


def test_without_a_model_the_command_says_so(root: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    with pytest.raises(
        UserError, match=r"none of evaluate.variants has its folder under models/: `lifecycle run`"
    ):
        open_playground(tmp_path, {})


@pytest.mark.parametrize("variant", ["base", "finetune", "ppo"])
def test_an_answer_is_that_of_the_evaluation(playground: Playground, root: Path, variant: str) -> None:
    lm = load(root / "models" / variant, COMPUTE)
    generation = {"do_sample": True, "max_new_tokens": 6, "top_k": 0, "temperature": 1.5, "num_beams": 1}
    expected = respond(lm, [PROMPT], generation, batch_size=1, seed=3)[0]
    playground.model(variant)  # opening an adapter draws numbers, answering does not
    state = torch.get_rng_state()
    answer = playground.answer(variant, PROMPT, "summarize", 0, asked("Sampling", temperature=1.5, seed=3))
    assert answer.text == expected != ""
    assert torch.equal(state, torch.get_rng_state())
    assert "".join(piece for piece, token in zip(answer.pieces, answer.ids, strict=True)
                   if token not in lm.tokenizer.all_special_ids).strip() == answer.text  # fmt: skip
    for position in range(len(answer.ids)):
        found = playground.steps(answer, position, asked("Greedy"))
        sure = float(found[0].probabilities[answer.ids[position]])
        assert sure == pytest.approx(answer.sureness[position], abs=1e-5)


def test_greedy_takes_the_likeliest_of_the_last_step(playground: Playground) -> None:
    settings = asked("Greedy", repetition_penalty=1.5)
    for variant in ("finetune", "ppo"):
        answer = playground.answer(variant, PROMPT, "summarize", 0, settings)
        for position, token in enumerate(answer.ids):
            assert int(playground.steps(answer, position, settings)[-1].scores.argmax()) == token


def test_models_are_opened_once_and_adapters_merged(root: Path) -> None:
    fresh = open_playground(root, {})
    assert fresh.model("base") is fresh.model("base_few_shot")
    assert type(fresh.model("finetune").model).__name__ == "T5ForConditionalGeneration"


def test_worked_examples_are_those_of_the_evaluation(playground: Playground, root: Path) -> None:
    params = playground.params
    train = read_examples(root / "data/examples/train.jsonl", tasks=["summarize"])
    shots = _draw_shots(params, train, playground.seed)
    example = playground.example("summarize", 0)
    for count in range(len(shots) + 1):
        expected = shot_prompts(playground.model("base"), [example], shots[:count], params.max_prompt_tokens)
        assert playground.with_worked("base", example.prompt, "summarize", count)[0] == expected[0]
    text, fitted = playground.with_worked("base", "word " * 300, "summarize", 2)
    assert (text, fitted) == ("word " * 300, 0)


def test_examples_go_round(playground: Playground) -> None:
    first = playground.example("act", 0)
    ids = [playground.example("act", number).id for number in range(40)]
    assert first.task == "act" and ids.count(first.id) > 1
    with pytest.raises(UserError, match="no task poem"):
        playground.example("poem", 0)


def test_a_prompt_that_cannot_be_answered_is_refused(playground: Playground) -> None:
    for prompt, words in ((" \n", "the prompt is empty"), ("x" * 20_001, "20,001 characters")):
        with pytest.raises(UserError, match=words):
            playground.answer("base", prompt, "summarize", 0, asked())
    with pytest.raises(UserError, match="there is no variant nobody"):
        playground.answer("nobody", PROMPT, "summarize", 0, asked())


def test_a_registered_adapter_opens_on_the_base_beside_it(root: Path, tmp_path: Path) -> None:
    from tasks.registry.register import pack_model

    pack_model(root / "models" / "finetune", tmp_path / "packed", "separate", COMPUTE)
    pack_model(root / "models" / "ppo", tmp_path / "plain", "separate", COMPUTE)
    versions = {"version 2": Variant(tmp_path / "packed", 0), "version 1": Variant(tmp_path / "plain", 0)}
    both = open_playground(root, versions)
    for version, variant in (("version 2", "finetune"), ("version 1", "ppo")):
        told = both.answer(version, PROMPT, "summarize", 0, asked())
        assert told.ids == both.answer(variant, PROMPT, "summarize", 0, asked()).ids


def test_special_tokens_have_names_and_pieces_make_the_text() -> None:
    lm = toy("t5")
    ids = lm.tokenizer(["Hello there"])["input_ids"][0]
    found = pieces(lm, ids)
    assert "".join(found[:-1]) == "Hello there"
    assert found[-1] == lm.tokenizer.eos_token


# --- what is shown


def an_answer(text: str) -> Answer:
    return Answer("v", text, 1, [1, 2], 3, [5, 6], [text, "</s>"], [0.5, 1.0], text, 1.0, -0.25, 0.125)


def test_what_people_and_models_write_is_text() -> None:
    shown = picture.cards({HOSTILE: an_answer(HOSTILE), "b": HOSTILE, "c": None}, 0.5)
    shown += picture.strip(an_answer(HOSTILE), 0) + picture.message(HOSTILE)
    step = Step(HOSTILE, torch.tensor([1.0, 0.0]))
    shown += picture.chart([step], *rows([step], 0, 1), {0: HOSTILE}, "Greedy")
    assert "<img" not in shown and "<b>" not in shown and "</textarea>" not in shown
    assert shown.count("&lt;img") >= 6


def test_a_card_tells_toxicity_reward_and_what_the_model_read() -> None:
    shown = picture.cards({"v": an_answer("fine")}, 0.5)
    for words in (">1.00<", ">-0.25<", ">0.12<", "2 tokens, 1 worked example, 3 cut out of its middle"):
        assert words in shown
    assert "reward" not in picture.cards({"v": an_answer("fine")._replace(reward=None)}, 0.5)
