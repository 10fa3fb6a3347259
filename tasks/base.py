"""The stage `base`: a language model to start from: made from scratch, a hub id, or a local folder.

With `pretraining` it learns from the raw text that `prepare` wrote (for a model that has been trained before:
domain adaptation). Without, a model from scratch stays random, and any other is saved as it is.

    python -m tasks.base
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from tasks.lm.architecture import Architecture
from tasks.lm.schedule import Schedule
from tasks.stage import Context, Section, UserError, run_stage
from tasks.stage.errors import say

if TYPE_CHECKING:
    from tasks.lm.model import LanguageModel
    from tasks.lm.pretrain import Lessons
    from tasks.lm.train import Training

TOKENS_PER_PARAMETER = 20  # compute-optimal training (Hoffmann et al. 2022, arXiv 2203.15556, table 3)


class Pretraining(Section):
    """What is learnt from raw text.

    A share `prefix_share` of the texts is cut in two and continued. In the others a T5 fills gaps of
    `mean_span` tokens on average, a share `corrupted` of all tokens; a causal model predicts every next token.
    """

    corrupted: Annotated[float, Field(gt=0, lt=1)]
    mean_span: Annotated[float, Field(ge=1)]
    prefix_share: Annotated[float, Field(ge=0, le=1)]
    learning_rate: PositiveFloat
    schedule: Schedule


class Params(Section):
    """`source` is `scratch` (then `architecture` is built), a hub id (at `revision`) or a folder.

    Texts are read in parts of at most `max_tokens` tokens; perplexity is taken on `held_out` validation texts.
    """

    source: Annotated[str, Field(min_length=1)]
    revision: str | None
    architecture: Architecture
    pretraining: Pretraining | None
    max_tokens: Annotated[int, Field(ge=8)]
    held_out: PositiveInt


def base(
    params: Params, train_text: Path, validation_text: Path, model: Path, reports: Path, context: Context
) -> Mapping[str, Any]:
    """Write the base model to `model` and its learning curves to `reports`; return the metrics.

    Perplexity is that of the second half of each held-out text given the first, which both families can tell.
    Raises UserError when the source cannot be opened, DataError when there is no text.
    """
    from tasks.lm.model import save
    from tasks.lm.peft import parameter_counts
    from tasks.lm.pretrain import cut, documents, read_texts
    from tasks.lm.respond import corpus_perplexity, likelihoods
    from tasks.lm.train import forget_checkpoints

    lm = _open(params, train_text, context)
    texts = read_texts(validation_text)[: params.held_out]
    parts = documents(lm, texts, params.max_tokens)
    prompts, responses = zip(*cut(lm, parts, [0.5] * len(parts)), strict=True)

    def measure() -> float:
        with context.progress(len(prompts), "base: perplexity") as bar:
            return corpus_perplexity(likelihoods(lm, prompts, responses, batch_size=32, progress=bar.advance))

    _, parameters = parameter_counts(lm)
    metrics: dict[str, Any] = {
        "parameters": parameters,
        "vocabulary": len(lm.tokenizer),
        "perplexity_before": measure(),
        "tokens_recommended": TOKENS_PER_PARAMETER * parameters,
    }
    if params.pretraining is None:
        context.first_alone()
        training, seen = None, 0
        metrics["perplexity_after"] = metrics["perplexity_before"]
    else:
        training = _pretrain(lm, params, params.pretraining, read_texts(train_text), texts, context)
        context.first_alone()
        seen = training.tokens
        metrics["perplexity_after"] = measure()
        metrics |= {
            "loss_before": training.evaluations[0]["eval_loss"],
            "loss_after": training.evaluations[-1]["eval_loss"],
            "steps": training.steps,
        }
    metrics |= {"tokens_seen": seen, "tokens_per_parameter": seen / parameters}
    say(_verdict(params.source, seen, parameters))
    _report(training, metrics["perplexity_after"], reports, context)
    save(lm, model)
    forget_checkpoints(context)
    return metrics


def _open(params: Params, train_text: Path, context: Context) -> "LanguageModel":
    from tasks.lm.attention import on_device
    from tasks.lm.model import LanguageModel, is_adapter, load
    from tasks.lm.pretrain import read_texts, sentinels_needed
    from tasks.lm.scratch import build

    if params.source != "scratch":
        lm = load(params.source, context.compute, params.revision, trainable=True)
        if is_adapter(lm):
            raise UserError(f"base.source: {params.source} is an adapter; name the full model it belongs to")
        return lm
    learnt = params.pretraining
    sentinels = sentinels_needed(params.max_tokens, learnt.corrupted, learnt.mean_span) if learnt else 0
    built = build(params.architecture, read_texts(train_text), sentinels)
    return LanguageModel(on_device(built.model, context.compute), built.tokenizer)


def _pretrain(
    lm: "LanguageModel",
    params: Params,
    learnt: Pretraining,
    texts: Sequence[str],
    held_out: Sequence[str],
    context: Context,
) -> "Training":
    from tasks.lm.pretrain import objective
    from tasks.lm.train import train

    def lessons(of: Sequence[str]) -> "Lessons":
        return objective(
            lm,
            of,
            max_tokens=params.max_tokens,
            corrupted=learnt.corrupted,
            mean_span=learnt.mean_span,
            prefix_share=learnt.prefix_share,
            seed=context.seed,
        )

    rows, pair = lessons(texts)
    held_out_rows, held_out_pair = lessons(held_out)
    held_out_pairs = [held_out_pair(row) for row in range(held_out_rows)]
    return train(
        lm,
        rows,
        pair,
        held_out_pairs,
        learnt.schedule,
        learnt.learning_rate,
        context,
        sort_responses=True,
    )


def _verdict(source: str, seen: int, parameters: int) -> str:
    """How much was read, in plain words, against what is worth reading for a model of this size."""
    if source != "scratch":
        return f"base: {source} read {seen:,} more tokens here"
    share = seen / (TOKENS_PER_PARAMETER * parameters)
    text = f"base: {parameters:,} parameters saw {seen:,} tokens, {seen / parameters:.1f} per parameter"
    if share < 0.5:
        return f"{text}: far below the {TOKENS_PER_PARAMETER} that are worth reading; more text would help"
    return f"{text} (worth reading: {TOKENS_PER_PARAMETER})"


def _report(training: "Training | None", perplexity: float, reports: Path, context: Context) -> None:
    """Without training the curves are the one point that is known: the loss of continuing a text."""
    from tasks.lm.curves import write_curves

    if training is None:
        write_curves(reports, [], [{"step": 0, "eval_loss": math.log(perplexity)}], "base: not trained here")
        return
    write_curves(reports, training.losses, training.evaluations, "base: learning from raw text")
    context.track.figure("base_loss", reports / "loss.png")
    context.track.metrics(
        {
            "seconds": training.seconds,
            "tokens_per_second": training.tokens_per_second,
            "peak_memory_mb": training.peak_memory / 2**20,
        }
    )


if __name__ == "__main__":
    run_stage(
        "base",
        Params,
        lambda params, context: base(
            params,
            Path("data/text/train.jsonl"),
            Path("data/text/validation.jsonl"),
            Path("models/base"),
            Path("reports/base"),
            context,
        ),
        trains=True,
    )
