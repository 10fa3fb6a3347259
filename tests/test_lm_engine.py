"""Answers from vLLM: a real one where `make vllm` was run, and around it a stand-in of its few calls."""

import signal
import stat
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from alignment_stages import LORA, ROLLOUTS, ppo_section, with_model
from lm_stages import ROOT, Workplace
from lm_toys import OPTIONS, context, shake, toy
from test_evaluate import params as evaluate_params

from tasks import evaluate
from tasks.lm import engine as engine_module
from tasks.lm.engine import Engine, sampling_of, takes, whole_weights
from tasks.lm.engine_settings import EngineSettings
from tasks.lm.model import LanguageModel
from tasks.lm.peft import adapt, merged
from tasks.rlhf.policy import Policy, new_policy
from tasks.rlhf.rollout import Responses, part, respond_by_sampling
from tasks.stage import ParamsError, UserError

INTERPRETER = ROOT / ".venv-vllm" / "bin" / "python"
PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [11] * 20]
HEADS = {"d_model": 64, "heads": 2}  # vLLM's kernels for CPUs want heads of 32 or more
STAND_IN = """
    import random
    from types import SimpleNamespace as Some

    SamplingParams = Some

    class LLM:
        def __init__(self, model, max_model_len, **options):
            assert max_model_len == 104

        def collective_rpc(self, method, kwargs):
            assert method == "reload_weights"

        def reset_prefix_cache(self):
            pass

        def generate(self, prompts, sampling, use_tqdm):
            return [self.answer(each) for each in sampling]

        def answer(self, asked):
            draw = random.Random(asked.seed)
            ids = [draw.randrange(5, 300) for _ in range(draw.randrange(1, asked.max_tokens))]
            ids += asked.stop_token_ids[:1]
            return Some(outputs=[Some(token_ids=ids, logprobs=[{token: Some(logprob=-1.0)} for token in ids])])
"""


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return toy("llama", **HEADS)


@pytest.fixture(scope="module")
def engine(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if not INTERPRETER.is_file():
        pytest.skip("no vLLM here: infra/vllm/install sets it up")
    settings = EngineSettings(python=str(INTERPRETER), memory=0.5)
    with Engine(settings, lm, 80, tmp_path_factory.mktemp("engine")) as started:
        yield started


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """An interpreter that has something called vllm."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "vllm.py").write_text(textwrap.dedent(STAND_IN))
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def answered(policy: Policy) -> Responses:
    return respond_by_sampling(policy, PROMPTS, torch.linspace(0.1, 0.9, 48).view(4, 12), batch_size=2)


def largest_gap(responses: Responses) -> float:
    assert responses.engine_logprobs is not None
    return float(((responses.engine_logprobs - responses.logprobs) * responses.mask).abs().max())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_samples_from_the_policy_as_that_is_now(engine: Engine, method: Any) -> None:
    lm = toy("llama", **HEADS)
    policy = new_policy(lm, method, LORA, temperature=0.7, engine=engine)
    first = answered(policy)
    shake(policy.lm, by=0.05)
    moved = answered(policy)
    with policy.reference_model() as reference:
        back = answered(replace(policy, lm=reference))
    assert max(map(largest_gap, (first, moved, back))) < 1e-3
    assert not torch.equal(moved.response_ids[0], moved.response_ids[2]), "one prompt, two draws"
    assert not torch.equal(moved.response_ids, first.response_ids)
    assert torch.equal(back.response_ids, first.response_ids)
    assert torch.equal(answered(policy).response_ids, moved.response_ids)


def test_the_numbers_are_the_policys_own_and_not_those_of_the_engine(
    stand_in: Path, tmp_path: Path, lm: LanguageModel
) -> None:
    settings = EngineSettings(python=str(stand_in), memory=0.5)
    with Engine(settings, lm, 104, tmp_path / "engine") as engine:
        policy = new_policy(toy("llama", **HEADS), "lora", LORA, temperature=0.7, engine=engine)
        torch.nn.init.normal_(policy.value_head.weight)
        responses = answered(policy)
    rows = list(range(len(PROMPTS)))
    batch, width = part(policy, PROMPTS, responses, rows)
    own = policy.evaluate(batch)
    torch.testing.assert_close(responses.logprobs, own.logprobs.detach() * responses.mask)
    torch.testing.assert_close(responses.values, own.values.detach() * responses.mask)
    assert responses.engine_logprobs is not None
    assert torch.equal(responses.engine_logprobs, -1.0 * responses.mask)
    assert responses.ended.all()
    assert width == responses.mask.sum(dim=1).max()


def test_greedy_answers_are_those_of_the_model(
    engine: Engine, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine_module, "Engine", lambda *_: nullcontext(engine))
    settings = EngineSettings(python=str(INTERPRETER), memory=0.5)
    params = evaluate_params(engine=settings.model_dump())
    engine.take(lm)
    counted: list[int] = []
    voices = [
        evaluate._voice(each, lm, context(tmp_path), counted.append) for each in (params, evaluate_params())
    ]
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": 12}
    with voices[0] as theirs, voices[1] as own:
        assert theirs(PROMPTS, greedy) == own(PROMPTS, greedy)
        beams = {**greedy, "num_beams": 2}
        assert theirs(PROMPTS, beams) == own(PROMPTS, beams)
        chance = theirs(PROMPTS, {"do_sample": True, "top_k": 0, "max_new_tokens": 12})
    assert chance[0] != chance[2], "one prompt, two draws"
    assert sum(counted) == 5 * len(PROMPTS)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"do_sample": False, "num_beams": 1, "temperature": 0.3, "max_new_tokens": 4},
            {"temperature": 0.0, "max_tokens": 4},
        ),
        ({"do_sample": True, "max_new_tokens": 4}, {"temperature": 1.0, "top_k": 50, "max_tokens": 4}),
        (
            {"do_sample": True, "top_k": 0, "top_p": 0.9, "max_new_tokens": 4},
            {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "max_tokens": 4},
        ),
        ({"num_beams": 4, "max_new_tokens": 4}, None),
        ({"no_repeat_ngram_size": 2, "max_new_tokens": 4}, None),
        ({"do_sample": False, "max_length": 20}, None),
    ],
)
def test_decoding_settings_keep_their_meaning(
    fields: Mapping[str, Any], expected: Mapping[str, Any] | None
) -> None:
    assert sampling_of(fields) == expected


def test_the_weights_are_those_of_the_merged_model(lm: LanguageModel) -> None:
    policy = new_policy(toy("llama", **HEADS), "lora", LORA, temperature=1.0)
    shake(policy.lm)
    sent = dict(whole_weights(policy.lm))
    with policy.reference_model() as reference:
        of_the_reference = dict(whole_weights(reference))
    for name, weight in lm.model.named_parameters(remove_duplicate=False):
        assert torch.equal(of_the_reference[name], weight)
    plain = dict(merged(policy.lm).model.named_parameters(remove_duplicate=False))
    assert sent.keys() == plain.keys()
    for name, weight in sent.items():
        torch.testing.assert_close(weight, plain[name])


def test_only_causal_models_with_whole_weights_are_taken(lm: LanguageModel) -> None:
    assert takes(lm)
    assert takes(new_policy(toy("llama"), "lora", LORA, temperature=1.0).lm)
    assert not takes(adapt(toy("llama"), "prompt_tuning", OPTIONS["prompt_tuning"]))
    assert not takes(toy("t5"))


def test_ppo_learns_from_its_answers_and_ends_with_the_same_bytes_after_a_kill(
    stand_in: Path, tmp_path: Path
) -> None:
    places = []
    for name in ("whole", "killed"):
        workplace = with_model(tmp_path / name, "llama")
        workplace.set(ppo=with_engine(stand_in))
        places.append(workplace)
    whole, killed = places
    whole.run("ppo")
    process = killed.start("ppo")
    end = time.monotonic() + 60
    while not list((killed.root / ".work" / "ppo").glob("*/checkpoint-2/manifest.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "no checkpoint in time"
        time.sleep(0.002)
    (engine,) = engines(killed)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    engine.wait(timeout=30)
    assert engines(killed) == []
    killed.run("ppo")
    assert killed.outputs("ppo") == whole.outputs("ppo")
    header, *rows = (whole.root / "reports" / "ppo" / "steps.csv").read_text().splitlines()
    assert "engine_kl" in header
    assert len(rows) == 6
    assert not list((whole.root / ".work" / "ppo").glob("**/*.safetensors"))


def test_an_engine_that_cannot_be_is_one_line(stand_in: Path, tmp_path: Path) -> None:
    workplace = with_model(tmp_path / "place", "llama")
    for python, said in (
        ("nowhere/python", "ppo: engine.python: there is no nowhere/python; `make vllm` sets one up\n"),
        (sys.executable, "ModuleNotFoundError: No module named 'vllm'"),
    ):
        workplace.set(ppo=with_engine(Path(python)))
        assert said in workplace.run("ppo", 2)
    with pytest.raises(UserError, match="No module named 'vllm'"):
        Engine(EngineSettings(python=sys.executable, memory=0.5), toy("llama"), 80, tmp_path / "engine")
    with pytest.raises(ParamsError, match="vLLM has no encoder-decoder models; set it to null"):
        Engine(EngineSettings(python=str(stand_in), memory=0.5), toy("t5"), 80, tmp_path / "engine")


def test_an_engine_that_ends_is_told_with_its_last_words(
    stand_in: Path, tmp_path: Path, lm: LanguageModel
) -> None:
    with (
        Engine(EngineSettings(python=str(stand_in), memory=0.5), lm, 104, tmp_path / "engine") as engine,
        pytest.raises(UserError, match=r"vLLM ended with code 1: .*stop_token_ids.* has all of it"),
    ):
        engine.answers(PROMPTS, range(4), {"stop_token_ids": None, "max_tokens": 3})


def with_engine(python: Path) -> dict[str, Any]:
    return ppo_section(rollouts={**ROLLOUTS, "engine": {"python": str(python), "memory": 0.5}})


def engines(workplace: Workplace) -> list[psutil.Process]:
    """The engines that work for the stages there."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if process.info["cwd"] == str(workplace.root) and "engine_process" in str(process.info["cmdline"])
    ]
