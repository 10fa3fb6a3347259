"""The stage `reward` as it is run, on toy sizes: what it learns and writes, and that it survives a kill."""

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alignment_stages import reward_section
from classifier_toys import KINDS, lay_model, toy_classifier
from lm_stages import Workplace
from lm_toys import COMPUTE, FAMILIES, context, unsaved
from pydantic import ValidationError
from test_base import assert_one_line
from torch import Tensor

from tasks.data.records import Comparisons, read_comparisons
from tasks.lm.classifier import Classifier, load_classifier, new_classifier, scores
from tasks.lm.collate import encode_prompts, encode_responses
from tasks.lm.model import load
from tasks.lm.respond import likelihoods
from tasks.lm.schedule import Schedule
from tasks.metrics import preferences
from tasks.reward import Params, _shuffled, reward
from tasks.rlhf.preference import _collate, elements, losses, train_on_preferences
from tasks.stage import DataError, ParamsError

GOOD = ("glad", "kind", "calm", "warm", "fair", "clear", "brave", "bright")
BAD = ("mean", "grim", "cold", "harsh", "sour", "dull", "cruel", "bitter")


def toy_comparisons(count: int, seed: int, flipped: float = 0.0) -> list[Comparisons]:
    """Two good answers before two bad ones; which they are is told by single words."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        words = [*draw.sample(GOOD, 2), *draw.sample(BAD, 2)]
        right = [(better, worse) for better in (0, 1) for worse in (2, 3)]
        flips = tuple(draw.random() < flipped for _ in right)
        found.append(
            Comparisons(
                id=f"{seed}:{number}",
                prompt=f"How was day {draw.randrange(100)}?",
                completions=tuple(f"It was a {word} day." for word in words),
                kinds=("answer", "answer", "sour", "sour"),
                pairs=tuple(pair[::-1] if flip else pair for pair, flip in zip(right, flips, strict=True)),
                flipped=flips,
                reference=f"It was a {words[0]} day.",
                group=f"{seed}:{number}",
            )
        )
    return found


def write(path: Path, comparisons: list[Comparisons]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(each.line() + "\n" for each in comparisons))
    return path


def ground(root: Path, kind: str, count: int = 48) -> Workplace:
    """Comparisons and a model to start from."""
    lay_model(kind, root / "models" / "finetune")
    write(root / "data" / "feedback" / "train.jsonl", toy_comparisons(count, 1))
    write(root / "data" / "feedback" / "test.jsonl", toy_comparisons(40, 2, flipped=0.1))
    return Workplace(root)


def called(root: Path, **changes: Any) -> Mapping[str, Any]:
    """The stage as a function, in the folder `root`."""
    section = reward_section(**changes)
    section["schedule"] = unsaved(section["schedule"])
    section["model"] = {"source": str(root / "models" / "finetune"), "revision": None}
    data = root / "data" / "feedback"
    return reward(
        Params(**section),
        data / "train.jsonl",
        data / "test.jsonl",
        root / "models" / "reward",
        root / "reports" / "reward",
        context(root, "reward"),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_learns_what_is_preferred_and_shuffled_labels_teach_nothing(
    kind: str, method: str, tmp_path: Path
) -> None:
    here = ground(tmp_path, kind)
    schedule = {**reward_section()["schedule"], "epochs": 6 if method == "full" else 10}
    metrics = called(
        here.root, method=method, schedule=schedule, shuffled_control=48 if method == "full" else 0
    )
    assert metrics["accuracy_ceiling"] < 0.95
    assert metrics["accuracy_unflipped"] > 0.8
    assert metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]
    assert 0.3 < metrics["accuracy_length_only"] < 0.7
    assert metrics["accuracy_bag_of_words"] > 0.8
    assert (metrics["pairs"], metrics["prompts"]) == (160, 40)
    assert (metrics["trainable_parameters"] == metrics["parameters"]) == (method == "full")
    if method == "full":
        assert metrics["accuracy_shuffled"] < 0.75
    assert set(metrics["accuracy_by_kind"]) == {"sour"}


@pytest.mark.parametrize("kind", KINDS)
def test_references_score_0_on_average_in_the_saved_model(kind: str, tmp_path: Path) -> None:
    here = ground(tmp_path, kind, count=16)
    metrics = called(here.root)
    assert abs(metrics["shift"]) > 1e-4
    train = read_comparisons(here.root / "data" / "feedback" / "train.jsonl")
    prompts, references = zip(*((each.prompt, str(each.reference)) for each in train), strict=True)
    opened = load_classifier(here.root / "models" / "reward", COMPUTE)
    assert np.mean(scores(opened, prompts, references, batch_size=5)) == pytest.approx(0, abs=1e-5)


def test_without_references_the_preferred_ones_score_0_on_average(tmp_path: Path) -> None:
    here = ground(tmp_path, "t5", count=16)
    train = [each.model_copy(update={"reference": None}) for each in toy_comparisons(16, 1)]
    write(here.root / "data" / "feedback" / "train.jsonl", train)
    called(here.root)
    preferred = [(each.prompt, each.completions[better]) for each in train for better, _ in each.pairs]
    opened = load_classifier(here.root / "models" / "reward", COMPUTE)
    assert np.mean(scores(opened, *zip(*preferred, strict=True), batch_size=5)) == pytest.approx(0, abs=1e-5)


def score_of(classifier: Classifier, each: Comparisons, completion: int) -> Tensor:
    """The score of one completion, read by itself."""
    texts = classifier.encode([each.prompt], [each.completions[completion]])
    return classifier.read(classifier.collate(texts)).scores


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_loss_is_that_of_the_preferred_answers(family: str, tmp_path: Path) -> None:
    folder = lay_model(family, tmp_path / "start")
    classifier = new_classifier(folder, COMPUTE, likelihood=2.0)
    classifier.model.eval()
    some = toy_comparisons(3, 1)
    lm = load(folder, COMPUTE)
    preferred = [(each.prompt, each.completions[better]) for each in some for better, _ in each.pairs]
    prompts, answers = zip(*preferred, strict=True)
    by_hand = likelihoods(lm, encode_prompts(lm, prompts), encode_responses(lm, answers), batch_size=1)
    found = losses(classifier, _collate(classifier, elements(classifier, some))).language
    assert found is not None
    assert found.item() == pytest.approx(np.mean([each.nll / each.tokens for each in by_hand]), abs=1e-5)


def test_the_language_loss_keeps_what_the_language_model_knew(tmp_path: Path) -> None:
    here = ground(tmp_path, "t5")
    test = toy_comparisons(40, 2)
    found = {}
    for weight in (0.0, 3.0):
        called(here.root, likelihood=1.0, language_loss=weight)
        classifier = load_classifier(here.root / "models" / "reward", COMPUTE)
        loss = losses(classifier, _collate(classifier, elements(classifier, test))).language
        assert loss is not None
        found[weight] = loss.item()
    assert found[3.0] < found[0.0] - 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision_reaches_a_loss_that_calls_parts_of_the_model(family: str, tmp_path: Path) -> None:
    classifier = new_classifier(lay_model(family, tmp_path / "start"), COMPUTE)
    half = replace(context(tmp_path), compute=COMPUTE.model_copy(update={"precision": "bf16"}))
    found = {True: set(), False: set()}  # while weights are learnt, and while they are not
    for layer in classifier.model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, __, output: found[output.requires_grad].add(output.dtype))
    rows = elements(classifier, toy_comparisons(8, 1))
    schedule = Schedule.model_validate(reward_section()["schedule"])
    train_on_preferences(classifier, rows, rows[:2], schedule, 0.01, 0.0, half)
    assert found == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    assert {parameter.dtype for parameter in classifier.model.parameters()} == {torch.float32}


def test_a_language_loss_without_likelihood_is_refused() -> None:
    with pytest.raises(ValidationError, match="language_loss is of the likelihood"):
        Params(**reward_section(language_loss=1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_all_pairs_in_one_element_are_the_mean_of_the_pairs_one_by_one(kind: str, tmp_path: Path) -> None:
    """Prompts with more pairs weigh no more than others."""
    classifier = toy_classifier(kind, tmp_path)
    some = toy_comparisons(3, 1)
    some[1] = some[1].model_copy(update={"pairs": some[1].pairs[:1], "flipped": (False,)})
    together = losses(classifier, _collate(classifier, elements(classifier, some))).preference
    expected = []
    for each in some:
        margins = [
            score_of(classifier, each, better) - score_of(classifier, each, worse)
            for better, worse in each.pairs
        ]
        expected.append(-torch.stack(margins).sigmoid().log().mean())
    assert together.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)


def test_each_completion_is_read_once_however_many_pairs_it_is_in(tmp_path: Path) -> None:
    classifier = toy_classifier("llama", tmp_path)
    some = toy_comparisons(3, 1)
    batch = _collate(classifier, elements(classifier, some))
    assert (len(batch["answer_ids"]), len(batch["end"])) == (3, 12)
    assert len(batch["better"]) == sum(len(each.pairs) for each in some) == 12


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A finished run with its control."""
    here = ground(tmp_path_factory.mktemp("done"), "t5")
    here.set(reward=reward_section(shuffled_control=20))
    here.run("reward")
    return here


def test_it_writes_the_model_the_metrics_and_a_report(done: Workplace) -> None:
    written = set(done.outputs("reward"))
    files = ("calibration.csv", "held_out.csv", "kinds.csv", "reward.png", "summary.md", "train.csv")
    assert {f"reports/reward/{name}" for name in files} | {"models/reward/config.json"} <= written
    page = (done.root / "reports" / "reward" / "summary.md").read_text()
    for line in ("the length alone", "the words alone", "the same model, labels shuffled", "| sour |"):
        assert line in page
    assert "shift" in json.loads((done.root / "metrics" / "reward.json").read_text())
    assert not list((done.root / ".work" / "reward").rglob("checkpoint-*"))


def test_killed_it_ends_with_the_same_bytes(done: Workplace, tmp_path: Path) -> None:
    killed = Workplace(tmp_path)
    for name in ("data", "models/finetune"):
        shutil.copytree(done.root / name, tmp_path / name)
    killed.set(reward=reward_section(shuffled_control=20))
    killed.kill_in_training("reward")
    assert not (tmp_path / "models" / "reward").exists()
    killed.run("reward")
    assert killed.outputs("reward") == done.outputs("reward")


def test_half_of_the_shuffled_labels_are_turned_and_nothing_else() -> None:
    some = toy_comparisons(200, 1)
    turned = 0
    for before, after in zip(some, _shuffled(some, 1), strict=True):
        assert before.model_copy(update={"pairs": ()}) == after.model_copy(update={"pairs": ()})
        for one, other in zip(before.pairs, after.pairs, strict=True):
            assert other in (one, one[::-1])
            turned += other != one
    assert 0.45 < turned / 800 < 0.55


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    here = ground(tmp_path, "t5")
    with pytest.raises(ParamsError, match=r"reward: 48 examples x 0\.05 epochs do not fill one batch of 4"):
        called(here.root, schedule=reward_section()["schedule"] | {"epochs": 0.05})
    lora = reward_section()["lora"] | {"target_modules": ["nowhere"]}
    here.set(reward=reward_section(method="lora", lora=lora))
    assert_one_line(here.run("reward", code=2), "lora on t5 with target_modules ['nowhere']")
    test = here.root / "data" / "feedback" / "test.jsonl"
    test.write_text(test.read_text() + "{}\n")
    with pytest.raises(DataError, match=r"test\.jsonl line 41: id: Field required; run feedback again"):
        called(here.root)
    test.unlink()
    with pytest.raises(DataError, match=r"test\.jsonl is missing; run feedback first"):
        called(here.root)


def test_calibration_is_0_where_confidence_is_accuracy_and_by_hand_elsewhere() -> None:
    confident = float(np.log(3))  # σ = 3/4
    assert preferences.calibration_error(np.array([confident] * 3 + [-confident])) == pytest.approx(0)
    assert preferences.calibration_error(np.array([confident] * 4)) == pytest.approx(0.25)
    assert preferences.reliability(np.array([confident, -confident, 9.0])) == [
        (pytest.approx(0.75), 0.5, 2),
        (pytest.approx(1 / (1 + np.exp(-9.0))), 1.0, 1),
    ]


def test_accuracy_counts_a_margin_of_0_half() -> None:
    measure = preferences.accuracy(np.array([1.0, 0.0, -1.0, 2.0]), np.array([0, 0, 1, 1]))
    assert measure.value == 0.625


def test_the_length_alone_tells_what_is_longer() -> None:
    def longer_first(count: int) -> list[Comparisons]:
        made = {"kinds": ("a", "b"), "pairs": ((0, 1),), "flipped": (False,), "reference": None}
        return [
            Comparisons(id="x", prompt="q", completions=(f"{n} a b c", f"{n} a"), group="g", **made)
            for n in range(count)
        ]

    assert (preferences.length_margins(longer_first(20), longer_first(5)) > 0).all()
