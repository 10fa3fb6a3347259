"""Training: the loss, the batches, and that an interrupted run ends with the bytes of an uninterrupted one."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_toys import (
    COMPUTE,
    FAMILIES,
    METHODS,
    OPTIONS,
    SCHEDULE,
    context,
    schedule,
    texts,
    toy,
)
from pydantic import ValidationError

from tasks.lm.collate import collate, encode_prompts, encode_responses
from tasks.lm.model import LanguageModel, load, save
from tasks.lm.peft import adapt, load_nf4
from tasks.lm.respond import response_logprobs
from tasks.lm.schedule import Schedule
from tasks.lm.train import Pair, Training, batches, mean_loss, sizes_of, train
from tasks.stage import Interrupted, NullTrack, ParamsError

ROWS = 48  # twelve steps of four


def pairs_of(lm: LanguageModel, seed: int = 5) -> list[Pair]:
    """Pairs of very different lengths."""
    prompts = [text[: 10 + 5 * number] for number, text in enumerate(texts(ROWS, seed))]
    responses = [text[: 4 + number % 20] for number, text in enumerate(texts(ROWS, seed + 1))]
    return list(zip(encode_prompts(lm, prompts), encode_responses(lm, responses), strict=True))


def run(
    lm: LanguageModel,
    folder: Path,
    track: NullTrack | None = None,
    rate: float = 0.01,
    **changes: Any,
) -> Training:
    pairs = pairs_of(lm)
    return train(
        lm,
        ROWS,
        lambda draw: pairs[draw % ROWS],
        pairs_of(lm, seed=9)[:8],
        schedule(**changes),
        rate,
        context(folder, track=track),
    )


def fresh(family: str, method: str, base: Path) -> LanguageModel:
    torch.manual_seed(2)
    loaded = load_nf4(base, COMPUTE) if method == "qlora" else load(base, COMPUTE, trainable=True)
    return adapt(loaded, method, OPTIONS[method])


def weights(lm: LanguageModel, folder: Path) -> bytes:
    save(lm, folder)
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


class CrashAt(NullTrack):
    """Ends the run, without any handling, when the loss of a step is recorded."""

    def __init__(self, step: int) -> None:
        self.step = step

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        if step == self.step:
            raise RuntimeError("the machine is gone")


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_batches_of_one_are_one_batch_of_eight(family: str, tmp_path: Path) -> None:
    whole, parts = toy(family), toy(family)
    size = {"batch_size": 8, "epochs": 0.5, "log_every": 1, "checkpoint_every": 1000, "rate": 1e-4}
    together = run(whole, tmp_path / "whole", **size)
    apart = run(parts, tmp_path / "parts", micro_batch_size=1, **size)
    assert together.steps == apart.steps == 3
    for one, other in zip(together.losses, apart.losses, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
    first, second = together.losses[0]["grad_norm"], apart.losses[0]["grad_norm"]
    assert second == pytest.approx(first, rel=1e-6)  # later ones differ as Adam blows up what was nearly 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_mean_over_the_response_tokens_of_the_batch(family: str, tmp_path: Path) -> None:
    lm = toy(family)
    pairs = pairs_of(lm)
    plan = batches(sizes_of(pairs, schedule()), schedule(), seed=1)
    prompts, responses = zip(*[pairs[draw] for draw in plan[0]], strict=True)
    logprobs = response_logprobs(lm, collate(lm, prompts, responses))
    expected = -logprobs.sum().item() / sum(map(len, responses))
    first = run(lm, tmp_path, log_every=1, checkpoint_every=1000).losses[0]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_both_losses(family: str, tmp_path: Path) -> None:
    lm = toy(family)
    before = mean_loss(lm, pairs_of(lm, seed=9)[:8], 4)
    training = run(lm, tmp_path, epochs=4, checkpoint_every=1000)
    assert training.evaluations[0] == {"step": 0, "eval_loss": before}
    assert [row["step"] for row in training.evaluations] == [0, 24, 48]
    assert [row["step"] for row in training.losses] == list(range(2, 49, 2))
    assert training.evaluations[-1]["eval_loss"] < before - 0.5
    assert training.losses[-1]["loss"] < training.losses[0]["loss"] - 0.5
    assert training.losses[-1]["learning_rate"] < training.losses[5]["learning_rate"] <= 0.01
    assert training.tokens == 4 * sum(len(p) + len(r) for p, r in pairs_of(lm))
    assert training.peak_memory > 2**20
    assert training.tokens_per_second > 0
    assert not lm.model.training


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("t5", method) for method in (*METHODS, "qlora")), ("llama", "lora"), ("llama", "prompt_tuning")],
)
def test_an_interrupted_run_ends_with_the_same_bytes(family: str, method: str, tmp_path: Path) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    save(toy(family, dropout=0.1), base)
    whole = fresh(family, method, base)
    expected = run(whole, tmp_path / "whole", checkpoint_every=1000)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run(fresh(family, method, base), tmp_path / "broken", track=CrashAt(10), checkpoint_every=8)
    steps: list[int] = []
    resumed = fresh(family, method, base)
    training = run(resumed, tmp_path / "broken", track=_steps_to(steps), checkpoint_every=8)
    assert min(steps) == 10  # resumed from step 8, not begun again
    assert training.losses == expected.losses
    assert training.evaluations == expected.evaluations
    assert weights(resumed, tmp_path / "two") == weights(whole, tmp_path / "one")


def _damage_by_cutting(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _damage_by_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (_damage_by_cutting, "model.safetensors"),
        (_damage_by_one_bit, "model.safetensors"),
        (Path.unlink, "optimizer.pt"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    damage: Callable[[Path], None], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = toy("llama")
    run(whole, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run(toy("llama"), tmp_path / "broken", track=CrashAt(10))
    work = tmp_path / "broken" / "work"
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    damage(work / "checkpoint-8" / name)
    steps: list[int] = []
    resumed = toy("llama")
    run(resumed, tmp_path / "broken", track=_steps_to(steps))
    assert min(steps) == 6
    assert re.search(f"checkpoint-8 is not used: .*{name}", capsys.readouterr().err)
    assert weights(resumed, tmp_path / "two") == weights(whole, tmp_path / "one")


def test_a_stop_request_saves_first_and_is_resumed(tmp_path: Path) -> None:
    whole = toy("t5")
    run(whole, tmp_path / "whole")

    class StopAt(NullTrack):
        def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
            if step == 6:
                stopped.stop.signal_number = 15

    stopped = context(tmp_path / "stopped", track=StopAt())
    lm = toy("t5")
    pairs = pairs_of(lm)
    with pytest.raises(Interrupted):
        train(lm, ROWS, lambda draw: pairs[draw % ROWS], pairs_of(lm, 9)[:8], schedule(), 0.01, stopped)
    assert (stopped.work / "checkpoint-8" / "manifest.json").is_file()
    steps: list[int] = []
    resumed = toy("t5")
    run(resumed, tmp_path / "stopped", track=_steps_to(steps))
    assert min(steps) == 10
    assert weights(resumed, tmp_path / "two") == weights(whole, tmp_path / "one")


def test_too_few_examples_for_a_batch_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ParamsError, match=re.escape("toy: 48 examples x 0.5 epochs do not fill one batch of 32")
    ):
        run(toy("t5"), tmp_path, batch_size=32, epochs=0.5)


def test_mixed_precision_keeps_the_weights_whole(tmp_path: Path) -> None:
    lm = toy("llama")
    pairs = pairs_of(lm)
    half = context(tmp_path)
    object.__setattr__(half, "compute", COMPUTE.model_copy(update={"precision": "bf16"}))
    exact = run(toy("llama"), tmp_path / "exact", checkpoint_every=1000)
    rounded = train(lm, ROWS, lambda draw: pairs[draw % ROWS], pairs_of(lm, 9)[:8], schedule(), 0.01, half)
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    losses = [[row["loss"] for row in training.losses] for training in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


LENGTH = st.integers(min_value=1, max_value=99)


@given(
    lengths=st.lists(st.tuples(LENGTH, LENGTH), min_size=8, max_size=60),
    epochs=st.sampled_from([0.5, 1, 2, 2.5]),
    micro=st.sampled_from([None, 1, 2]),
    seed=st.integers(min_value=0, max_value=9),
)
def test_every_epoch_sees_every_row_once(
    lengths: list[tuple[int, int]], epochs: float, micro: int | None, seed: int
) -> None:
    settings = schedule(epochs=epochs, micro_batch_size=micro)
    pairs = [(range(prompt), range(response)) for prompt, response in lengths]
    plan = batches(sizes_of(pairs, settings), settings, seed)
    draws = [draw for part in plan for draw in part]
    assert len(set(draws)) == len(draws) == int(len(lengths) * epochs) // 4 * 4
    assert {len(part) for part in plan} <= {micro or 4}
    rows = [draw % len(lengths) for draw in draws]
    assert max(rows.count(row) for row in set(rows)) <= -(-len(draws) // len(lengths))
    whole = schedule(epochs=epochs)
    assert draws == [draw for part in batches(sizes_of(pairs, whole), whole, seed) for draw in part]


def test_a_batch_holds_rows_of_similar_sizes_and_seeds_differ() -> None:
    sizes = np.array([(1 + (37 * row) % 100, 1 + (53 * row) % 64) for row in range(800)])
    plan = batches(sizes, schedule(), seed=0)
    assert np.mean([np.ptp(sizes[part, 0]) for part in plan]) <= 4
    both = batches(sizes, schedule(), seed=0, sort_responses=True)
    assert np.mean([np.ptp(sizes[part], axis=0) for part in both]) <= 10
    assert np.mean([np.ptp(sizes[part, 1]) for part in plan]) > 30
    prompts = [sizes[part[0], 0] for part in plan]
    assert prompts != sorted(prompts, reverse=True)
    assert plan != batches(sizes, schedule(), seed=1)


def test_an_epoch_may_have_sizes_of_its_own() -> None:
    rows = 64
    first = np.array([(1, 1), (50, 1)] * (rows // 2))
    sizes = np.concatenate([first, first[::-1]])
    plan = batches(sizes, schedule(epochs=2), seed=0)
    assert {draw for part in plan for draw in part} == set(range(2 * rows))
    assert all(len(set(sizes[part, 0])) == 1 for part in plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 3}, "batch_size 4 is not a multiple of micro_batch_size 3"),
        ({"checkpoint_every": 5}, "checkpoint_every 5 is not a multiple of log_every 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Schedule.model_validate({**SCHEDULE, **changes})


def test_a_checkpoint_that_was_never_finished_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run(toy("llama"), tmp_path, track=CrashAt(10))
    for checkpoint in (tmp_path / "work").iterdir():
        (checkpoint / "manifest.json").unlink()
    steps: list[int] = []
    run(toy("llama"), tmp_path, track=_steps_to(steps))
    assert min(steps) == 0
    shutil.rmtree(tmp_path / "work")


def _steps_to(steps: list[int]) -> NullTrack:
    class Steps(NullTrack):
        def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
            if step is not None:
                steps.append(step)

    return Steps()
