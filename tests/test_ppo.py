"""The stage `ppo` as it is run: resumed to the byte, guarded against its own reward, refused in one line."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from alignment_stages import ROLLOUTS, UPDATE, WIDE, ppo_section, with_model
from lm_stages import Workplace
from lm_toys import FAMILIES
from pydantic import ValidationError
from test_base import assert_one_line

from tasks.rlhf.course import rows_of_step
from tasks.rlhf.settings import Rollouts

KEYS = {
    "reward_before", "reward_after", "kl", "beta", "objective", "objective_before", "objective_optimum",
    "share_of_gain", "guard_events", "stopped_because", "steps", "episodes", "toxicity_before",
    "toxicity_after",
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A finished run of each family."""
    workplace = with_model(tmp_path_factory.mktemp(request.param), request.param)
    workplace.set(ppo=ppo_section())
    workplace.run("ppo")
    return workplace


def test_it_tells_what_it_reached(done: Workplace) -> None:
    metrics = done.metrics("ppo")
    assert set(metrics) >= KEYS
    assert (metrics["steps"], metrics["episodes"], metrics["guard_events"]) == (6, 48, 0)
    assert metrics["stopped_because"] == "all steps were taken"
    assert metrics["objective_before"] <= metrics["objective_optimum"]
    assert metrics["objective"] == pytest.approx(metrics["reward_after"] - 0.1 * metrics["kl"])
    reports = done.root / "reports" / "ppo"
    assert {path.name for path in reports.iterdir()} == {
        "steps.csv", "held_out.csv", "answers.jsonl", "summary.md", "ppo.png",
    }  # fmt: skip
    assert len((reports / "steps.csv").read_text().splitlines()) == 7
    assert len((reports / "held_out.csv").read_text().splitlines()) == 5


def test_the_model_opens_without_code_of_ours(done: Workplace) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder = done.root / "models" / "ppo"
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(folder)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not (folder / "adapter_config.json").exists()


def test_killed_after_a_step_it_ends_with_the_same_bytes(done: Workplace, tmp_path: Path) -> None:
    """One family after the first step, the other after a later one, when the guard has measured and saved."""
    after = 1 if done.root.name.startswith("t5") else 4
    again = Workplace(tmp_path)
    for name in ("data", "models", "params.yaml", "dvc.yaml"):
        source = done.root / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    shutil.rmtree(tmp_path / "models" / "ppo")
    process = again.start("ppo")
    end = time.monotonic() + 100
    while not list((tmp_path / ".work" / "ppo").glob(f"*/checkpoint-{after}/manifest.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "no checkpoint in time"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "models" / "ppo").exists()
    again.run("ppo")
    assert again.outputs("ppo") == done.outputs("ppo")


def test_every_pass_over_the_data_answers_each_prompt_as_often() -> None:
    rows = [row for step in range(5) for row in rows_of_step(step, episodes=8, answers=2, rows=10, seed=3)]
    assert rows[::2] == rows[1::2], "answers to the same prompt stand side by side"
    first, second = rows[:20:2], rows[20::2]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_episodes_that_are_no_multiple_of_the_answers_are_refused() -> None:
    with pytest.raises(ValidationError, match="8 episodes are no multiple of 3 answers to a prompt"):
        Rollouts(**{**ROLLOUTS, "answers": 3})


LONGER: dict[str, Any] = {
    "reward": {"longer": {"kind": "length", "free_words": 0, "weight": 1.0}},
    "kl": {"beta": 0.0, "target": None, "horizon": 1000},
    "rollouts": {
        **ROLLOUTS,
        "max_response_tokens": 16,
        "unfinished_penalty": 0.0,
        "episodes": 16,
        "batch_size": 16,
    },
    "update": {**UPDATE, "learning_rate": 0.03},
    "steps": 40,
}


@pytest.mark.parametrize(("on_stop", "code"), [("keep", 0), ("fail", 3)])
def test_the_guard_stops_a_reward_that_wants_length_alone(on_stop: str, code: int, tmp_path: Path) -> None:
    workplace = with_model(tmp_path, "t5")
    section = ppo_section(**LONGER)
    section["guard"] |= {
        "limits": {**WIDE, "length_ratio_high": 1.2, "kl": 0.02},  # broken at most checks, whatever the seed
        "every": 1,
        "on_stop": on_stop,
    }
    workplace.set(ppo=section)
    said = workplace.run("ppo", code)
    told = [line.partition("guard at step")[2] for line in said.splitlines() if "guard at step" in line]
    acts = [line.split(": ")[1].partition(" (")[0] for line in told]
    assert list(dict.fromkeys(acts)) == ["warn", "raise beta", "roll back", "stop"]
    assert acts[-1] == "stop"
    if code == 3:
        assert not (workplace.root / "models" / "ppo").exists()
        return
    metrics = workplace.metrics("ppo")
    assert metrics["stopped_because"].startswith("the guard stopped it at step")
    assert metrics["steps"] < 40
    assert metrics["guard_events"] == len(acts)
    assert metrics["beta"] > 0
    assert (workplace.root / "reports" / "ppo" / "summary.md").read_text().count("- step ") == len(acts)


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    workplace = with_model(tmp_path, "t5")
    for changes, said in (
        ({"task": "translate"}, "ppo.task is translate, but data/examples/train.jsonl has no example of it"),
        ({"value": {"trunk": "shared", "source": "models/reward"}}, "a shared trunk has no source of its own"),
        ({"reward": {"nice": {"kind": "oracel", "weight": 1.0}}}, "ppo.reward.nice"),
    ):
        workplace.set(ppo=ppo_section(**changes))
        assert_one_line(workplace.run("ppo", 2), said)
