"""The stage `quantize`: fewer bits for each weight, and what that costs.

Writes the model in every scheme that is compared (tasks/compress/schemes.py lists them), opens each as anyone
would, answers the same held-out prompts, and keeps one. `int4_qat` is trained for a few steps with rounded
weights, on what the dense model itself predicts, so that it learns nothing new but to bear the rounding. The
others are not trained.

    python -m tasks.quantize
"""

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tasks.compress.schemes import BITS, WITH_BITSANDBYTES, Scheme
from tasks.lm.schedule import Schedule
from tasks.metrics.detector import Detector, scorer
from tasks.stage import Context, DataError, ParamsError, Section, run_stage
from tasks.stage.fingerprint import hash_file

if TYPE_CHECKING:
    from tasks.data.records import Example
    from tasks.lm.model import LanguageModel
    from tasks.lm.train import Pair
    from tasks.metrics.measures import Measures
    from tasks.metrics.toxicity import Scorer


class Smoothing(Section):
    """SmoothQuant of `int8_dynamic`, by what `examples` training examples activate.

    `strength` is the share of the difficulty that goes from activations to weights.
    """

    examples: PositiveInt
    strength: Annotated[float, Field(ge=0, le=1)]


class Training(Section):
    """`int4_qat` learns what the dense model predicts along the answers of `examples` training examples."""

    examples: PositiveInt
    learning_rate: PositiveFloat
    schedule: Schedule


class Timing(Section):
    """Answers of `new_tokens` tokens to a batch of each of `batch_sizes`, the median of `repeats`."""

    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)]
    new_tokens: PositiveInt
    repeats: PositiveInt


class Params(Section):
    """The section `quantize` of params.yaml.

    The model in the folder `source` is written in each scheme that is `compared`; `scheme` is the one that is
    kept. `int4` schemes have a scale for each `group_size` weights. Scores are taken on the first `prompts`
    validation examples of `task`, `shown` of them with all answers in the report.
    """

    source: str
    scheme: Scheme
    compared: Annotated[list[Scheme], Field(min_length=1)]
    group_size: PositiveInt
    smoothing: Smoothing | None
    training: Training
    task: str
    prompts: PositiveInt
    max_prompt_tokens: PositiveInt
    max_response_tokens: PositiveInt
    batch_size: PositiveInt
    toxicity: Detector
    timing: Timing
    bootstrap_samples: PositiveInt
    shown: NonNegativeInt

    @model_validator(mode="after")
    def _kept_is_compared(self) -> Self:
        if self.scheme not in self.compared:
            raise ValueError(f"scheme is {self.scheme}, which is not compared ({', '.join(self.compared)})")
        if len(set(self.compared)) < len(self.compared):
            raise ValueError(f"compared names a scheme twice: {', '.join(self.compared)}")
        return self


def quantize(
    params: Params, train_data: Path, validation_data: Path, model: Path, reports: Path, context: Context
) -> Mapping[str, Any]:
    """Write the quantised model and a report of all schemes compared; return the metrics.

    Raises DataError when a file has no example of the task, UserError when the source cannot be opened,
    ParamsError when a setting does not fit it or a package is missing.
    """
    from tasks.compress.quantization_report import write_report
    from tasks.lm.model import save
    from tasks.lm.train import forget_checkpoints
    from tasks.metrics.measures import differences, flat
    from tasks.stage.files import new_folder

    _check_packages(params.compared)
    train = _examples(train_data, params.task)
    held_out = _examples(validation_data, params.task)[: params.prompts]
    context.track.dataset("examples", train_data, hash_file(train_data), len(train))
    toxicity = scorer(params.toxicity, params.batch_size, context.compute)
    work = context.work / "schemes"
    dense = _opened(params.source, context)
    parameters = sum(parameter.numel() for parameter in dense.model.parameters())
    save(dense, work / "dense")
    scores: dict[str, Measures] = {}
    answers: dict[str, list[str]] = {}
    with context.progress(len(params.compared) + 1, "quantize: schemes") as bar:
        for scheme in (None, *params.compared):
            name = scheme or "dense"
            if scheme is not None:
                _write(scheme, params, train, work, context)
            scores[name], answers[name] = _measured(work / name, name, held_out, params, toxicity, context)
            bar.advance()

    sizes = {name: _weights_bytes(work / name) for name in scores}
    schemes = {
        name: {
            **flat(found, params.bootstrap_samples, context.seed),
            "bytes": sizes[name],
            "bytes_ratio": sizes[name] / sizes["dense"],
            "same_answers": _share_equal(answers[name], answers["dense"]),
        }
        for name, found in scores.items()
    }
    kept = schemes[params.scheme]
    loss = differences(scores["dense"], scores[params.scheme], params.bootstrap_samples, context.seed)
    metrics = {
        "scheme": params.scheme,
        "parameters": parameters,
        "bytes": kept["bytes"],
        "bytes_dense": sizes["dense"],
        "bytes_ratio": kept["bytes_ratio"],
        **{name: kept[name] for name in scores["dense"]},
        **{f"{name}_dense": schemes["dense"][name] for name in scores["dense"]},
        **{f"rougeL_loss{end}": loss[f"rougeL{end}"] for end in ("", "_low", "_high")},
        "prompts": len(held_out),
        "schemes": schemes,
    }
    with new_folder(model) as folder:
        shutil.copytree(work / params.scheme, folder, dirs_exist_ok=True)
    write_report(metrics, _side_by_side(held_out[: params.shown], answers), reports)
    shutil.rmtree(work)
    forget_checkpoints(context)
    return metrics


def _check_packages(compared: Sequence[Scheme]) -> None:
    for scheme in compared:
        if scheme in WITH_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
            raise ParamsError(
                f"quantize.compared: {scheme} needs bitsandbytes; install it (pip install '.[qlora]') "
                f"or take {scheme} out"
            )


def _opened(source: str | Path, context: Context) -> "LanguageModel":
    """The dense model, without adapter."""
    from tasks.lm.model import load
    from tasks.lm.peft import merged

    return merged(load(source, context.compute, trainable=True))


def _write(scheme: Scheme, params: Params, train: "Sequence[Example]", work: Path, context: Context) -> None:
    """Write the dense model in `work` in a scheme, beside it."""
    from tasks.compress.formats import check_groups, save_integers, save_with_bitsandbytes
    from tasks.compress.smoothing import smooth
    from tasks.lm.model import save

    dense = work / "dense"
    lm = _opened(dense, context)
    if scheme in BITS and scheme != "int8":
        check_groups(lm.model, params.group_size)
    match scheme:
        case "int8":
            save_integers(lm, work / scheme, BITS[scheme], None)
        case "int4":
            save_integers(lm, work / scheme, BITS[scheme], params.group_size)
        case "int4_qat":
            _train(lm, BITS[scheme], params, train, context)
            save_integers(lm, work / scheme, BITS[scheme], params.group_size)
        case "int8_dynamic" if params.smoothing is not None:
            pairs = _pairs(lm, train[: params.smoothing.examples], params)
            smooth(lm, pairs, params.smoothing.strength, params.batch_size)
            save(lm, work / "smoothed")
            save_with_bitsandbytes(work / "smoothed", work / scheme, scheme, context.compute)
        case _:
            save_with_bitsandbytes(dense, work / scheme, scheme, context.compute)


def _train(
    lm: "LanguageModel", bits: int, params: Params, examples: "Sequence[Example]", context: Context
) -> None:
    """Train `lm` in place, its weights rounded in every pass, to say what it said when they were not."""
    from tasks.compress.quantized_training import train_rounded

    given = params.training
    pairs = _pairs(lm, examples[: given.examples], params)
    train_rounded(
        lm,
        pairs,
        pairs[: params.batch_size],
        bits,
        params.group_size,
        given.schedule,
        given.learning_rate,
        context,
    )


def _pairs(lm: "LanguageModel", examples: "Sequence[Example]", params: Params) -> "list[Pair]":
    """Token ids of prompts and first right answers."""
    from tasks.lm.collate import encode_prompts, encode_responses

    return list(
        zip(
            encode_prompts(lm, [example.prompt for example in examples], params.max_prompt_tokens),
            encode_responses(lm, [example.reference for example in examples], params.max_response_tokens),
            strict=True,
        )
    )


def _measured(
    folder: Path,
    name: str,
    held_out: "Sequence[Example]",
    params: Params,
    toxicity: "Scorer",
    context: Context,
) -> "tuple[Measures, list[str]]":
    """The scores of the model in `folder` and its answers; its speed goes to the record of the run."""
    import numpy as np

    from tasks.compress.quantization_report import SCORES
    from tasks.compress.speed import speed, weights_memory
    from tasks.lm.model import load
    from tasks.lm.respond import likelihoods, respond
    from tasks.metrics import measures

    lm = load(folder, context.compute)
    answers = respond(
        lm,
        [example.prompt for example in held_out],
        _greedy(params),
        batch_size=params.batch_size,
        seed=context.seed,
        max_prompt_tokens=params.max_prompt_tokens,
    )
    prompts, references = zip(*_pairs(lm, held_out, params), strict=True)
    found = likelihoods(lm, prompts, references, batch_size=params.batch_size)
    nll, tokens = np.array(found, dtype=np.float64).T
    scores = measures.quality(
        answers, [example.outputs for example in held_out], [example.slots for example in held_out]
    )
    scores |= measures.toxicity(toxicity(answers), params.toxicity.toxic_from)
    scores["perplexity"] = measures.perplexity(nll, tokens)
    recorded = {f"{name}.memory_mb": weights_memory(lm) / 2**20}
    for size in params.timing.batch_sizes:
        timed = speed(lm, prompts, size, params.timing.new_tokens, params.timing.repeats)
        recorded |= {f"{name}.{key}_batch_{size}": value for key, value in timed._asdict().items()}
    context.track.metrics(recorded)
    return {key: scores[key] for key in SCORES if key in scores}, answers


def _greedy(params: Params) -> dict[str, Any]:
    return {"do_sample": False, "num_beams": 1, "max_new_tokens": params.max_response_tokens}


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _share_equal(some: Sequence[str], others: Sequence[str]) -> float:
    return sum(one == other for one, other in zip(some, others, strict=True)) / len(some)


def _side_by_side(examples: "Sequence[Example]", answers: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [
        {"reference": example.reference, **{name: texts[row] for name, texts in answers.items()}}
        for row, example in enumerate(examples)
    ]


def _examples(path: Path, task: str) -> "list[Example]":
    from tasks.data.records import read_examples

    found = read_examples(path, [task])
    if not found:
        raise DataError(f"quantize.task is {task}, but {path} has no example of it")
    return found


if __name__ == "__main__":
    run_stage(
        "quantize",
        Params,
        lambda params, context: quantize(
            params,
            Path("data/examples/train.jsonl"),
            Path("data/examples/validation.jsonl"),
            Path("models/quantize"),
            Path("reports/quantize"),
            context,
        ),
    )
