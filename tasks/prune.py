"""The stage `prune`: take weights out of a model by magnitude or by Wanda, and tune what is left.

Unstructured and 2:4 sparsity set weights to zero; structured pruning takes out whole heads and channels, so
that the model gets smaller and faster. The report compares methods, patterns and sparsities side by side.
Tuning learns the dense model's own answers: the references may hold what it was taught not to say.

    python -m tasks.prune
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tasks.lm.schedule import Schedule
from tasks.metrics.detector import Detector
from tasks.stage import Context, DataError, Section, run_stage
from tasks.stage.fingerprint import hash_file

if TYPE_CHECKING:
    from tasks.compress.sparse import Pruned
    from tasks.data.records import Example
    from tasks.lm.model import LanguageModel
    from tasks.lm.train import Pair

Method = Literal["magnitude", "wanda"]
Pattern = Literal["unstructured", "2:4", "structured"]
Share = Annotated[float, Field(gt=0, lt=1)]


class Dense(Section):
    """The model that is pruned: a folder (an adapter is merged) or hub id, at `revision`."""

    source: Annotated[str, Field(min_length=1)]
    revision: str | None


class Lora(Section):
    """Low-rank updates, scaled by `alpha` / `r`, of `target_modules` (null: PEFT's choice)."""

    r: PositiveInt
    alpha: PositiveInt
    dropout: Literal[0]  # what is trained must be what is merged
    target_modules: list[str] | Literal["all-linear"] | None


class Recovery(Section):
    """Tuning after pruning, on the dense model's answers to the prompts of `examples` training examples."""

    examples: PositiveInt
    learning_rate: PositiveFloat
    lora: Lora
    schedule: Schedule


class Sweep(Section):
    """What the report compares, on `prompts` of the held-out prompts, all without recovery; 2:4 counts once."""

    methods: Annotated[list[Method], Field(min_length=1)]
    patterns: Annotated[list[Pattern], Field(min_length=1)]
    sparsities: Annotated[list[Share], Field(min_length=1)]
    prompts: PositiveInt


class Params(Section):
    """The section `prune` of params.yaml.

    `sparsity` is the share of the weights of all linear layers that goes, compared within `scope` (where
    unstructured), or of the heads and channels (structured). Wanda sees the inputs of `calibration` training
    examples; `held_out` validation prompts of one `task` are answered for the scores.
    """

    model: Dense
    method: Method
    pattern: Pattern
    scope: Literal["row", "layer", "global"]
    sparsity: Share
    calibration: PositiveInt
    recovery: Recovery | None
    max_prompt_tokens: PositiveInt
    max_response_tokens: PositiveInt
    batch_size: PositiveInt
    sweep: Sweep
    task: str
    held_out: PositiveInt
    toxicity: Detector

    @model_validator(mode="after")
    def _half_of_four(self) -> Self:
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f"pattern 2:4 takes half of the weights: sparsity {self.sparsity} must be 0.5")
        return self


def prune(
    params: Params, train_data: Path, validation_data: Path, model: Path, reports: Path, context: Context
) -> Mapping[str, Any]:
    """Write the pruned model to `model`, and the reports; return the metrics.

    Raises DataError when there are no examples, UserError when there is no such model, ParamsError when it has
    not the shape for the pattern.
    """
    from tasks.compress.assess import assessor, named
    from tasks.compress.lessons import Limits, own_answers
    from tasks.compress.pruning_report import write_report
    from tasks.compress.sparse import input_norms, pruned
    from tasks.lm.model import load, save
    from tasks.lm.peft import merged
    from tasks.lm.train import forget_checkpoints, mean_loss

    examples = _examples(train_data, None)
    held_out = _examples(validation_data, params.task)[: params.held_out]
    context.track.dataset("examples", train_data, hash_file(train_data), len(examples))
    random.Random(context.seed).shuffle(examples)
    dense = merged(load(params.model.source, context.compute, params.model.revision, trainable=True))
    limits = Limits(params.max_prompt_tokens, params.max_response_tokens, params.batch_size)
    assess = assessor(params.toxicity, limits, context.compute)
    tuned_on = 0 if params.recovery is None else params.recovery.examples
    examples = examples[: max(params.calibration, tuned_on)]
    with context.progress(len(examples) + len(held_out), "prune: the dense model answers") as bar:
        pairs, held_out_pairs = (own_answers(dense, some, limits, bar.advance) for some in (examples, held_out))
    norms = {"magnitude": None, "wanda": input_norms(dense, pairs[: params.calibration])}

    def told(lm: "LanguageModel", prompts: int) -> dict[str, float]:
        found = assess(lm, held_out[:prompts])
        loss = mean_loss(lm, held_out_pairs[:prompts], params.batch_size)
        return {**found.scores, "loss": loss, "tokens_per_second": found.tokens_per_second}

    rows = []
    with context.progress(None, "prune: methods side by side") as bar:
        for method, pattern, sparsity in _swept(params.sweep):
            one = pruned(dense, pattern, params.scope, sparsity, norms[method])
            row = {"method": method, "pattern": pattern, "sparsity": sparsity}
            rows.append(row | told(one.lm, params.sweep.prompts))
            bar.advance()
    chosen = pruned(dense, params.pattern, params.scope, params.sparsity, norms[params.method])
    scores = {"dense": told(dense, len(held_out)), "before_recovery": told(chosen.lm, len(held_out))}
    if params.recovery is not None:
        chosen = _recovered(params.recovery, chosen, pairs, held_out_pairs, context)
    scores["pruned"] = told(chosen.lm, len(held_out))
    speeds = {name: each.pop("tokens_per_second") for name, each in scores.items()}
    for row in rows:
        row.pop("tokens_per_second")
    metrics: dict[str, Any] = {
        **scores["pruned"],
        **named(scores["dense"], "dense"),
        **named(scores["before_recovery"], "before_recovery"),
        **_sizes(chosen, dense),
        "held_out": len(held_out),
    }
    save(chosen.lm, model)
    write_report(reports, params.model_dump(), metrics, rows)
    context.track.figure("prune", reports / "prune.png")
    context.track.metrics(
        {
            "answer_tokens_per_second": speeds["pruned"],
            "answer_tokens_per_second_dense": speeds["dense"],
            "speed_ratio": speeds["pruned"] / speeds["dense"],
        }
    )
    forget_checkpoints(context)
    return metrics


def _recovered(
    recovery: Recovery,
    found: "Pruned",
    pairs: "Sequence[Pair]",
    held_out: "Sequence[Pair]",
    context: Context,
) -> "Pruned":
    import torch

    from tasks.compress.sparse import Pruned, recover

    torch.manual_seed(context.seed)
    tuned, training = recover(
        found,
        recovery.lora.model_dump(),
        pairs[: recovery.examples],
        held_out,
        recovery.schedule,
        recovery.learning_rate,
        context,
    )
    context.track.metrics({"seconds": training.seconds, "peak_memory_mb": training.peak_memory / 2**20})
    return Pruned(tuned, found.masks)


def _sizes(found: "Pruned", dense: "LanguageModel") -> dict[str, float]:
    from tasks.compress.assess import weight_bytes
    from tasks.compress.sparse import sparsity_of
    from tasks.lm.peft import parameter_counts

    parameters, parameters_dense = parameter_counts(found.lm)[1], parameter_counts(dense)[1]
    zeros = sum(int((parameter == 0).sum()) for parameter in found.lm.model.parameters())
    return {
        "sparsity": sparsity_of(found.lm, found.masks) if found.masks else 1 - parameters / parameters_dense,
        "parameters": parameters,
        "parameters_dense": parameters_dense,
        "parameters_not_zero": parameters - zeros,
        "bytes": weight_bytes(found.lm),
        "bytes_dense": weight_bytes(dense),
        "bytes_ratio": weight_bytes(found.lm) / weight_bytes(dense),
    }


def _swept(sweep: Sweep) -> list[tuple[Method, Pattern, float]]:
    return [
        (method, pattern, sparsity)
        for pattern in sweep.patterns
        for method in sweep.methods
        for sparsity in ([0.5] if pattern == "2:4" else sweep.sparsities)
    ]


def _examples(path: Path, task: str | None) -> "list[Example]":
    from tasks.data.records import read_examples

    found = read_examples(path, None if task is None else [task])
    if not found:
        wanted = "examples" if task is None else f"example of {task}, which is prune.task"
        raise DataError(f"{path} has no {wanted}")
    return found


if __name__ == "__main__":
    run_stage(
        "prune",
        Params,
        lambda params, context: prune(
            params,
            Path("data/examples/train.jsonl"),
            Path("data/examples/validation.jsonl"),
            Path("models/prune"),
            Path("reports/prune"),
            context,
        ),
    )
