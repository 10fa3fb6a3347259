"""`lifecycle score`: rows in order with answers and scores, what goes on after a stop, and what is refused."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_host
import pytest
from classifier_toys import toy_classifier
from lm_toys import COMPUTE
from playground_toys import lay_out

from flows.score import score
from tasks.lm.classifier import load_classifier, save_classifier, scores
from tasks.lm.model import load
from tasks.lm.peft import merged_to_answer
from tasks.lm.respond import respond
from tasks.scoring.models import Models
from tasks.scoring.prompts import Part
from tasks.stage import DataError, TryAgain, UserError
from tasks.stage.lock import Lock

PROMPTS = [f"Where does #Person{1 + number % 2}# meet {'you ' * number}at {number}?" for number in range(8)]
ROWS = [{"id": number, "prompt": prompt, "café": "é"} for number, prompt in enumerate(PROMPTS)]
SAMPLING = ("do_sample=true", "temperature=2.0", "top_k=0")


@pytest.fixture(scope="module")
def repository_with_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = lay_out(tmp_path_factory.mktemp("score"))
    save_classifier(toy_classifier("t5", root / "unused"), root / "models" / "reward")
    return root


@pytest.fixture
def root(repository_with_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(repository_with_models)
    return repository_with_models


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answered(
    root: Path,
    folder: Path,
    wanted: str = "base",
    settings: Sequence[str] = (),
    name: str = "out",
    part_rows: int = 3,
) -> bytes:
    """What becomes of ROWS."""
    source = lines(folder / "in.jsonl", ROWS)
    assert score(root, wanted, settings, None, source, folder / name, part_rows, None) == len(ROWS)
    return (folder / name).read_bytes()


def test_rows_come_back_in_order_with_what_the_models_say(root: Path, tmp_path: Path) -> None:
    found = [json.loads(line) for line in answered(root, tmp_path, "finetune", part_rows=8).splitlines()]
    lm = merged_to_answer(load(root / "models" / "finetune", COMPUTE))
    texts = respond(lm, PROMPTS, {"max_new_tokens": 6, "do_sample": False}, batch_size=64, seed=1)
    rewards = scores(load_classifier(root / "models" / "reward", COMPUTE), PROMPTS, texts, batch_size=64)
    assert len(set(texts)) > 2 and len(set(rewards)) > 2
    assert [row["answer"] for row in found] == texts
    assert [row["reward"] for row in found] == [round(reward, 4) for reward in rewards]
    assert {row["toxicity"] for row in found} == {0.0}
    assert [{name: row[name] for name in ROWS[0]} for row in found] == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_a_folder_is_a_model_too_and_settings_replace_those_of_the_evaluation(
    root: Path, tmp_path: Path
) -> None:
    usual = answered(root, tmp_path, "ppo")
    assert answered(root, tmp_path, "models/ppo") == usual
    sampled = answered(root, tmp_path, "ppo", SAMPLING)
    assert sampled == answered(root, tmp_path, "ppo", SAMPLING) != usual


def test_equal_prompts_are_sampled_anew_in_each_part(root: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", [{"prompt": PROMPTS[0]}] * 6)
    score(root, "ppo", SAMPLING, 5, source, tmp_path / "out", 2, None)
    found = [json.loads(line)["answer"] for line in (tmp_path / "out").read_text().splitlines()]
    assert len({tuple(found[at : at + 2]) for at in (0, 2, 4)}) == 3


def test_the_same_command_goes_on_where_it_stopped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, begun = answered(root, tmp_path, name="whole"), []
    lines_of = Models.lines

    def stopped(models: Models, part: Part, progress: Any = None) -> bytes:
        begun.append(part.first)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return lines_of(models, part, progress)

    monkeypatch.setattr(Models, "lines", stopped)
    with pytest.raises(KeyboardInterrupt):
        answered(root, tmp_path)
    assert not (tmp_path / "out").exists()
    with (tmp_path / ".out.unfinished").open("ab") as file:
        file.write(b'{"id": 6, "prom')  # as a kill in the middle of a write leaves it
    assert answered(root, tmp_path) == whole
    assert begun == [0, 3, 6, 6]
    assert "going on behind row 6 of 8" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "whole"]


@pytest.mark.parametrize("change", ["settings", "model", "prompts"])
def test_other_results_begin_anew(
    change: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines_of, begun = Models.lines, []

    def stopped(models: Models, part: Part, progress: Any = None) -> bytes:
        begun.append(part.first)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return lines_of(models, part, progress)

    monkeypatch.setattr(Models, "lines", stopped)
    with pytest.raises(KeyboardInterrupt):
        answered(root, tmp_path)
    if change == "prompts":
        monkeypatch.setattr("test_scoring.ROWS", ROWS[::-1])
    answered(root, tmp_path, *{"settings": ("base", ["num_beams=2"]), "model": ("ppo",)}.get(change, ()))
    assert begun == [0, 3, 0, 3, 6]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": ', "line 2: found"),
        ("[1]", "line 2: found [1], expected a JSON object"),
        ('{"promt": "x"}', "line 2, column prompt: found no such column, expected text that is not blank"),
        ('{"prompt": 3}', "line 2, column prompt: found 3, expected text"),
        ('{"prompt": " "}', 'line 2, column prompt: found " ", expected text'),
        ('{"prompt": "x", "answer": "y"}', "line 2, column answer: found a column that the results have"),
        ('{"prompt": "\\ud800"}', "line 2: found half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_answered(
    line: str, expected: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Models, "__init__", None)
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"prompt": "good"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        score(root, "base", [], None, source, tmp_path / "out", 1, None)
    assert str(caught.value).startswith(f"{source} {expected}")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("wanted", "settings", "expected"),
    [
        ("bse", [], "bse is neither a folder nor a variant whose model is there; variants: base"),
        ("base_few_shot", [], "base_few_shot begins prompts with worked examples: score base"),
        ("distill", [], "distill is neither a folder nor"),
        ("base", ["num_beam=2"], "num_beam is no field of GenerationConfig; did you mean num_beams?"),
        ("base", ["temperature=0.7"], "generation: "),
        ("base", ["num_beams"], "expected section.key=value"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    wanted: str, settings: list[str], expected: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        answered(root, tmp_path, wanted, settings)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be(root: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", ROWS)
    for wrong, output, expected in (
        (tmp_path / "none.jsonl", tmp_path / "out", "no such file"),
        (lines(tmp_path / "empty.jsonl", []), tmp_path / "out", "empty, expected at least one row"),
        (source, source, "is the file of --input"),
        (source, tmp_path, "is a folder"),
    ):
        with pytest.raises(UserError, match=expected):
            score(root, "base", [], None, wrong, output, 4, None)
    lock = Lock(tmp_path / ".out.lock")
    assert lock.acquire()
    with pytest.raises(TryAgain, match=f"written by process {os.getpid()}"):
        score(root, "base", [], None, source, tmp_path / "out", 4, None)


def test_the_command(root: Path, tmp_path: Path) -> None:
    source, output = lines(tmp_path / "in.jsonl", ROWS[:2]), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "flows.cli", "score", "base", "--input", source.name]

    def call(*options: str) -> tuple[int, str, str]:
        # the files are seen from where the command is given, which is below the root of the repository
        there = root / "data"
        relative = [os.path.relpath(source, there) if word == source.name else word for word in command]
        done = command_host.run([*relative, *options], there, os.environ)
        return done.returncode, done.stdout, done.stderr

    assert call("--output", os.path.relpath(output, root / "data"))[:2] == (0, f"2 rows in {output}\n")
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [0, 1]
    source.write_text("{}\n")
    code, _, told = call("--output", os.path.relpath(output, root / "data"))
    assert (code, len(told.splitlines())) == (2, 1) and "line 1, column prompt" in told
