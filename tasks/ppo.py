"""The stage `ppo`: the fine-tuned model learns from a reward, and is held near to where it started.

Proximal policy optimisation (tasks/rlhf/trainer.py), watched by a guard (tasks/rlhf/guard.py) that looks at
held-out prompts through what the reward cannot see. The result is a plain model, its adapter merged in. An
interrupted run goes on from its last checkpoint and ends with the same bytes.

    python -m tasks.ppo
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from tasks.metrics.detector import scorer
from tasks.rlhf.settings import Kl, Part, Rollouts, Update, Value, Watch
from tasks.stage import Context, DataError, GateRefused, ParamsError, Section, run_stage
from tasks.stage.fingerprint import hash_file

if TYPE_CHECKING:
    from tasks.data.records import Example
    from tasks.lm.engine import Engine
    from tasks.lm.model import LanguageModel
    from tasks.metrics.toxicity import Scorer
    from tasks.rlhf.assess import Held


class Lora(Section):
    """The policy is a low-rank update, scaled by `alpha` / `r`, of `target_modules` (null: PEFT's choice).

    Without `encoder` an encoder is left as it is, and each prompt is read once a step, whatever the number of
    epochs; a model without one is adapted all the same.
    """

    r: PositiveInt
    alpha: PositiveInt
    dropout: Literal[0]  # the policy that is updated must be the one that sampled
    target_modules: list[str] | Literal["all-linear"] | None
    encoder: bool


class Objective(Section):
    """The objective is taken on `prompts` held-out prompts with `samples` answers each."""

    prompts: PositiveInt
    samples: PositiveInt
    bootstrap_samples: PositiveInt


class Params(Section):
    """The section `ppo` of params.yaml.

    The prompts are those of the examples of one `task`: `all`, or the `toxic` ones, as the guard's detector has
    it. `shown` held-out prompts are answered in the report at every look of the guard.
    """

    task: str
    prompts: Literal["all", "toxic"]
    method: Literal["lora", "full"]
    lora: Lora
    value: Value
    steps: PositiveInt
    checkpoint_every: PositiveInt
    rollouts: Rollouts
    reward: Annotated[dict[str, Part], Field(min_length=1)]
    kl: Kl
    update: Update
    guard: Watch
    objective: Objective
    shown: PositiveInt


def ppo(
    params: Params,
    train_data: Path,
    validation_data: Path,
    start: Path,
    model: Path,
    reports: Path,
    context: Context,
) -> Mapping[str, Any]:
    """Write the model that PPO makes of the one in `start`, and the reports; return the metrics.

    Raises DataError when a file has no example of the task, UserError when a model of the reward cannot be
    opened, GateRefused when the guard stops a run that shall not be kept.
    """
    from tasks.lm.device import allow_tf32
    from tasks.lm.model import load
    from tasks.lm.peft import merged

    if params.rollouts.engine is not None and context.place.processes > 1:
        raise ParamsError("ppo.rollouts.engine answers one process; set compute.processes to 1, or it to null")
    allow_tf32(context.compute)  # log-probabilities from bf16 would blur the ratios of old and new policy
    toxicity = scorer(params.guard.toxicity, params.rollouts.batch_size, context.compute)
    only = toxicity if params.prompts == "toxic" else None
    toxic_from = params.guard.toxicity.toxic_from
    examples = _examples(train_data, params.task, only, toxic_from)
    held_out = _examples(validation_data, params.task, only, toxic_from)
    if len(held_out) < 2:
        raise DataError(
            f"ppo: {validation_data} has only one prompt for the guard to watch; it needs two or more"
        )
    context.track.dataset("examples", train_data, hash_file(train_data), len(examples))
    lm = merged(load(start, context.compute, trainable=True))
    with _engine(params.rollouts, lm, context) as engine:
        return _aligned(params, lm, engine, toxicity, examples, held_out, model, reports, context)


def _engine(
    rollouts: Rollouts, lm: "LanguageModel", context: Context
) -> "AbstractContextManager[Engine | None]":
    """What samples in the policy's place, for the time of the block; None: nothing does."""
    if rollouts.engine is None:
        return nullcontext()
    from tasks.lm.engine import Engine

    longest = rollouts.max_prompt_tokens + rollouts.max_response_tokens
    return Engine(rollouts.engine, lm, longest, context.work / "engine")


def _aligned(
    params: Params,
    lm: "LanguageModel",
    engine: "Engine | None",
    toxicity: "Scorer",
    examples: "list[Example]",
    held_out: "list[Example]",
    model: Path,
    reports: Path,
    context: Context,
) -> Mapping[str, Any]:
    from tasks.lm.collate import encode_prompts
    from tasks.lm.model import save
    from tasks.lm.train import forget_checkpoints
    from tasks.rlhf.assess import draw_before_and_after, objectives
    from tasks.rlhf.course import Course
    from tasks.rlhf.guard import Guard
    from tasks.rlhf.policy import new_critic, new_policy
    from tasks.rlhf.report import write_report
    from tasks.rlhf.scoring import weighted_sum
    from tasks.rlhf.trainer import Ppo

    reward = weighted_sum(params.reward, context.compute)
    critic = new_critic(params.value, lm, context.compute)
    options, temperature = params.lora.model_dump(), params.rollouts.temperature
    policy = new_policy(lm, params.method, options, temperature, critic, engine)
    trainer = Ppo(
        policy, reward, params.kl, params.rollouts, params.update, params.steps, context.seed, context.place
    )
    watched = _held(lm, held_out[: params.guard.prompts], 1, params.rollouts, context.seed)
    fewest, processes = min(params.rollouts.episodes, len(watched.prompts)), context.place.processes
    if fewest < processes:
        raise ParamsError(
            f"compute.processes is {processes}, but there are {fewest} episodes or held-out prompts"
        )
    guard = Guard(params.guard.limits.as_limits())
    course = Course(trainer, guard, watched, toxicity, params.guard, params.shown)
    course.resume(context.work)
    prompts = encode_prompts(lm, [example.prompt for example in examples], params.rollouts.max_prompt_tokens)
    course.run(params.steps, examples, prompts, params.checkpoint_every, context)
    if course.events and course.events[-1]["act"] == "stop" and params.guard.on_stop == "fail":
        raise GateRefused(f"ppo: {course.stopped_because}")

    context.first_alone()
    many = _held(
        lm, held_out[-params.objective.prompts :], params.objective.samples, params.rollouts, context.seed
    )
    drawn = draw_before_and_after(policy, reward, many, params.objective.samples, params.rollouts)
    before, after, kl = drawn
    metrics = {
        "reward_before": float(before.mean()),
        "reward_after": float(after.mean()),
        "kl": float(kl.mean()),
        "beta": trainer.beta,
        **objectives(*drawn, trainer.beta, params.objective.bootstrap_samples, context.seed),
        "gold_before": course.looks[0]["gold"],
        "gold_after": course.looks[-1]["gold"],
        "toxicity_before": course.looks[0]["toxicity"],
        "toxicity_after": course.looks[-1]["toxicity"],
        "guard_events": len(course.events),
        "stopped_because": course.stopped_because,
        "steps": course.steps_done,
        "episodes": course.steps_done * params.rollouts.episodes,
        "trainable_parameters": sum(parameter.numel() for _, parameter in policy.parameters()),
    }
    save(policy.answering(), model)
    write_report(course, metrics, reports)
    context.track.figure("ppo", reports / "ppo.png")
    forget_checkpoints(context)
    return metrics


def _held(
    lm: "LanguageModel", examples: "Sequence[Example]", samples: int, rollouts: Rollouts, seed: int
) -> "Held":
    """Held-out examples with the random numbers of `samples` answers to each."""
    import torch

    from tasks.lm.collate import encode_prompts
    from tasks.rlhf.assess import Held

    prompts = encode_prompts(lm, [example.prompt for example in examples], rollouts.max_prompt_tokens)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(examples) * samples, rollouts.max_response_tokens, generator=generator)
    return Held(examples, prompts, draws)


def _examples(path: Path, task: str, only: "Scorer | None", toxic_from: float) -> "list[Example]":
    """The examples of a task, or those with a prompt that `only` calls toxic."""
    from tasks.data.records import read_examples

    found = read_examples(path, [task])
    if not found:
        raise DataError(f"ppo.task is {task}, but {path} has no example of it")
    if only is None:
        return found
    chances = only([example.prompt for example in found])
    toxic = [example for example, chance in zip(found, chances, strict=True) if chance >= toxic_from]
    if not toxic:
        raise DataError(f"ppo.prompts is toxic, but no prompt of {task} in {path} is; set it to all")
    return toxic


if __name__ == "__main__":
    run_stage(
        "ppo",
        Params,
        lambda params, context: ppo(
            params,
            Path("data/examples/train.jsonl"),
            Path("data/examples/validation.jsonl"),
            Path("models/finetune"),
            Path("models/ppo"),
            Path("reports/ppo"),
            context,
        ),
        trains=True,
    )
