"""The stage `finetune`: teach the base model to answer instructions, by one of seven methods.

Loss on the response only. The result is a full model (`full`, `bitfit`) or a PEFT adapter on the base.

    python -m tasks.finetune
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from tasks.data.records import Example, read_examples
from tasks.lm.schedule import Schedule
from tasks.stage import Context, DataError, ParamsError, Section, run_stage
from tasks.stage.fingerprint import hash_file

if TYPE_CHECKING:
    from tasks.lm.model import LanguageModel
    from tasks.lm.train import Pair


class Full(Section):
    """Every parameter is trained."""

    learning_rate: PositiveFloat


class Lora(Section):
    """Low-rank updates, scaled by `alpha` / `r`, of `target_modules` (null: PEFT's choice)."""

    learning_rate: PositiveFloat
    r: PositiveInt
    alpha: PositiveInt
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: list[str] | Literal["all-linear"] | None


class VirtualTokens(Section):
    """Trained vectors that stand in front of the text, or of each layer's keys and values."""

    learning_rate: PositiveFloat
    virtual_tokens: PositiveInt


class Ia3(Section):
    """Trained scales; null modules: PEFT's choice for the architecture."""

    learning_rate: PositiveFloat
    target_modules: list[str] | None
    feedforward_modules: list[str] | None


class Bitfit(Section):
    """Trains the parameters whose name has one of `parameters` in it."""

    learning_rate: PositiveFloat
    parameters: Annotated[list[str], Field(min_length=1)]


class Params(Section):
    """How to fine-tune; the section named like the `method` is used, `lora` for `qlora` too.

    `tasks` selects training examples (null: all tasks). A longer prompt loses its middle, a longer response its
    end. The held-out loss is taken on `held_out` validation examples of the same tasks.
    """

    method: Literal["full", "lora", "qlora", "prompt_tuning", "prefix_tuning", "ia3", "bitfit"]
    tasks: Annotated[list[str], Field(min_length=1)] | None
    max_prompt_tokens: PositiveInt
    max_response_tokens: PositiveInt
    held_out: PositiveInt
    schedule: Schedule
    full: Full
    lora: Lora
    prompt_tuning: VirtualTokens
    prefix_tuning: VirtualTokens
    ia3: Ia3
    bitfit: Bitfit

    @property
    def options(self) -> dict[str, Any]:
        """What the chosen method is told."""
        chosen: dict[str, Any] = self.model_dump()["lora" if self.method == "qlora" else self.method]
        return chosen


def finetune(
    params: Params,
    train_data: Path,
    validation_data: Path,
    base: Path,
    model: Path,
    reports: Path,
    context: Context,
) -> Mapping[str, Any]:
    """Write the fine-tuned model to `model` and its learning curves to `reports`; return the metrics.

    Raises ParamsError when a task has no example or the method does not fit the model.
    """
    from tasks.lm.curves import write_curves
    from tasks.lm.model import load, save
    from tasks.lm.peft import adapt, load_nf4, parameter_counts
    from tasks.lm.train import forget_checkpoints, train

    examples = _examples(train_data, params.tasks)
    held_out = _examples(validation_data, params.tasks)[: params.held_out]
    context.track.dataset("examples", train_data, hash_file(train_data), len(examples))
    loaded = (
        load_nf4(base, context.compute)
        if params.method == "qlora"
        else load(base, context.compute, trainable=True)
    )
    lm = adapt(loaded, params.method, params.options)
    trainable, total = parameter_counts(lm)
    pairs, cut = encode(lm, examples, params)
    training = train(
        lm,
        len(pairs),
        lambda draw: pairs[draw % len(pairs)],
        encode(lm, held_out, params)[0],
        params.schedule,
        params.options["learning_rate"],
        context,
    )
    context.first_alone()
    save(lm, model)
    write_curves(reports, training.losses, training.evaluations, f"finetune: {params.method}")
    context.track.figure("finetune_loss", reports / "loss.png")
    context.track.metrics(
        {
            "seconds": training.seconds,
            "tokens_per_second": training.tokens_per_second,
            "peak_memory_mb": training.peak_memory / 2**20,
        }
    )
    forget_checkpoints(context)
    return {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_share": trainable / total,
        "weights_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "examples": len(examples),
        "cut_examples": cut,
        "tokens_seen": training.tokens,
        "steps": training.steps,
        "loss_before": training.evaluations[0]["eval_loss"],
        "loss_after": training.evaluations[-1]["eval_loss"],
    }


def encode(lm: "LanguageModel", examples: Sequence[Example], params: Params) -> "tuple[list[Pair], int]":
    """Token ids of each example's prompt and first right answer, and how many had to be cut."""
    from tasks.lm.collate import cut_middle, encode_prompts, encode_responses

    prompts = encode_prompts(lm, [example.prompt for example in examples])
    responses = encode_responses(lm, [example.reference for example in examples])
    whole = list(zip(prompts, responses, strict=True))
    pairs: list[Pair] = [
        (cut_middle(prompt, params.max_prompt_tokens), response[: params.max_response_tokens])
        for prompt, response in whole
    ]
    return pairs, sum(before != after for before, after in zip(whole, pairs, strict=True))


def _examples(path: Path, tasks: Sequence[str] | None) -> list[Example]:
    found = read_examples(path, tasks)
    missing = sorted(set(tasks or ()) - {example.task for example in found})
    if missing:
        raise ParamsError(f"finetune.tasks: {path} has no example of {missing[0]}; null takes all tasks")
    if not found:
        raise DataError(f"{path} has no examples; run prepare with a source that gives some")
    return found


if __name__ == "__main__":
    run_stage(
        "finetune",
        Params,
        lambda params, context: finetune(
            params,
            Path("data/examples/train.jsonl"),
            Path("data/examples/validation.jsonl"),
            Path("models/base"),
            Path("models/finetune"),
            Path("reports/finetune"),
            context,
        ),
        trains=True,
    )
