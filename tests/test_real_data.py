"""The whole pipeline on dialogues that people wrote: the preset `dialogsum` at a small size, stage by stage."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.params_file import change
from tasks import base, evaluate, finetune, prepare
from tasks.data.records import read_examples
from tasks.stage import Context, NullTrack
from tasks.stage.params import read_section, read_shared, read_yaml

pytestmark = pytest.mark.real_data
SMALL = (
    "compute.device=cpu",
    "base.architecture.d_model=64",
    "base.architecture.layers=1",
    "base.architecture.d_ff=128",
    "base.architecture.vocabulary=1200",
    "base.max_tokens=128",
    "base.held_out=16",
    "base.pretraining.learning_rate=0.004",
    "base.pretraining.schedule.epochs=1",
    "base.pretraining.schedule.evaluations=2",
    "finetune.method=full",
    "finetune.tasks=[summarize]",
    "finetune.full.learning_rate=0.005",
    "finetune.max_prompt_tokens=160",
    "finetune.max_response_tokens=48",
    "finetune.held_out=16",
    "finetune.schedule.epochs=2",
    "finetune.schedule.evaluations=2",
    "evaluate.examples={main_task: 16, other_tasks: 4, decoding: 4}",
    "evaluate.generation.max_new_tokens=24",
    "evaluate.max_prompt_tokens=160",
    "evaluate.bootstrap_samples=200",
)


@pytest.fixture(scope="module")
def metrics(
    repository: Path, real_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What each stage said, after all have run."""
    root = tmp_path_factory.mktemp("dialogsum")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(repository / name, root)
    shutil.copytree(repository / "presets", root / "presets")
    shutil.copytree(real_data / "dialogsum", root / "inputs" / "dialogsum")
    change(root, ["dialogsum"], SMALL)
    values = read_yaml(root / "params.yaml")
    for later in ("ppo", "distill", "prune", "quantize"):  # as far as the fine-tuned model
        del values["evaluate"]["variants"][later]
    values["evaluate"]["alignment"] = None
    shared = read_shared(values)
    examples, text, models = root / "data" / "examples", root / "data" / "text", root / "models"

    def section(name: str, params: Any) -> tuple[Any, Context]:
        work = root / ".work" / name
        work.mkdir(parents=True)
        torch.manual_seed(shared.seed)
        context = Context(name=name, seed=shared.seed, compute=shared.compute, work=work, track=NullTrack())
        return read_section(values, name, params), context

    made: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        params, context = section("prepare", prepare.Params)
        made["prepare"] = prepare.prepare(
            params, examples, text, root / "rejects", root / "card.md", root / "card", context
        )
        params, context = section("base", base.Params)
        made["base"] = dict(
            base.base(
                params,
                text / "train.jsonl",
                text / "validation.jsonl",
                models / "base",
                root / "curves",
                context,
            )
        )
        params, context = section("finetune", finetune.Params)
        made["finetune"] = dict(
            finetune.finetune(
                params,
                examples / "train.jsonl",
                examples / "validation.jsonl",
                models / "base",
                models / "finetune",
                root / "tuning",
                context,
            )
        )
        params, context = section("evaluate", evaluate.Params)
        made["evaluate"] = evaluate.evaluate(params, examples, models, root / "report", context)
    prompts = {split: read_examples(examples / f"{split}.jsonl") for split in ("train", "test")}
    assert not {one.input for one in prompts["train"]} & {one.input for one in prompts["test"]}
    return made


def test_every_dialogue_is_used(metrics: dict[str, dict[str, Any]]) -> None:
    figures = metrics["prepare"]
    assert (figures["examples_read"], figures["examples_rejected"]) == (1000, 0)
    used = sum(figures[f"examples_{split}"] for split in ("train", "validation", "test"))
    assert used >= 990
    assert figures["summarize_test"] == figures["topic_test"] >= 16


def test_the_held_out_loss_falls(metrics: dict[str, dict[str, Any]]) -> None:
    for stage in ("base", "finetune"):
        assert metrics[stage]["loss_after"] < 0.9 * metrics[stage]["loss_before"]
    assert metrics["base"]["perplexity_after"] < 0.5 * metrics["base"]["perplexity_before"]


def test_tuning_beats_the_base(metrics: dict[str, dict[str, Any]]) -> None:
    scores = metrics["evaluate"]
    assert scores["finetune"]["rougeL_low"] > scores["base"]["rougeL_high"]
    assert scores["differences"]["base"]["rougeL_low"] > 0
