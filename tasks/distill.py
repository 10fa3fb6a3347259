"""The stage `distill`: a small student learns what a larger teacher would answer, and how surely.

The loss is that of Hinton et al. 2015 (arXiv 1503.02531), by default on the teacher's own answers
(sequence-level distillation, Kim & Rush 2016, arXiv 1606.07947): an aligned teacher does not say what the
references of its training data still do. As a control the same student learns twice more from a few examples,
with the teacher and from their references alone.

    python -m tasks.distill
"""

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tasks.lm.schedule import Schedule
from tasks.metrics.detector import Detector
from tasks.stage import Context, DataError, ParamsError, Section, run_stage
from tasks.stage.fingerprint import hash_file

if TYPE_CHECKING:
    from tasks.compress.lessons import Limits
    from tasks.compress.teacher import Foreseen
    from tasks.data.records import Example
    from tasks.lm.model import LanguageModel
    from tasks.lm.train import Pair, Training


class Teacher(Section):
    """A model folder (an adapter is merged) or hub id, at `revision`."""

    source: Annotated[str, Field(min_length=1)]
    revision: str | None


class Student(Section):
    """The size of the student; null: as the teacher.

    It starts with layers of the `teacher`, and with the heads and channels in them that matter most for the
    first `calibration` examples; or with random weights (`scratch`), where its `width` may differ too.
    `encoder` layers count only where there is an encoder. `head_size` is how wide a head is; those of a teacher
    can be made narrower in a T5 alone.
    """

    start: Literal["teacher", "scratch"]
    width: PositiveInt | None
    encoder: PositiveInt | None
    decoder: PositiveInt | None
    heads: PositiveInt | None
    head_size: PositiveInt | None
    channels: PositiveInt | None
    calibration: PositiveInt


class Soft(Section):
    """The weight `alpha` of the teacher's distribution at `temperature`, beside the labels, and how many of its
    likeliest tokens are kept by name (null: all).

    `states` is the weight of the distance between the last hidden states of student and teacher, which must be
    equally wide: of what they make of the prompt, and of what they predict the response from. 0: not compared.
    The teacher's are written down once if that takes no more than `kept_gb` gigabytes; else it computes them
    anew at every step.
    """

    alpha: Annotated[float, Field(gt=0, le=1)]
    temperature: PositiveFloat
    top_k: PositiveInt | None
    states: NonNegativeFloat
    kept_gb: NonNegativeFloat


class OnPolicy(Section):
    """The `share` of the batches that the student answers itself, at `temperature`, and the divergence `beta`.

    It goes from 0, KL of teacher to student, to 1, KL of student to teacher.
    """

    share: Annotated[float, Field(ge=0, le=1)]
    beta: Annotated[float, Field(ge=0, le=1)]
    temperature: PositiveFloat


class Control(Section):
    """The student learns from so many `examples`, for so many `epochs`, with the teacher and without."""

    examples: PositiveInt
    epochs: PositiveFloat


class Params(Section):
    """The section `distill` of params.yaml.

    The student learns from `examples` training examples (null: all), with the teacher's answers or the
    references as `labels`, as the section named like the `method` says. Scores are those of answers to
    `held_out` validation prompts of one `task`.
    """

    teacher: Teacher
    student: Student
    labels: Literal["teacher", "reference"]
    method: Literal["soft", "on_policy"]
    soft: Soft
    on_policy: OnPolicy
    examples: PositiveInt | None
    max_prompt_tokens: PositiveInt
    max_response_tokens: PositiveInt
    batch_size: PositiveInt
    schedule: Schedule
    learning_rate: PositiveFloat
    control: Control | None
    task: str
    held_out: PositiveInt
    toxicity: Detector


def distill(
    params: Params, train_data: Path, validation_data: Path, model: Path, reports: Path, context: Context
) -> Mapping[str, Any]:
    """Write the student to `model`, and the reports; return the metrics.

    Raises DataError when there are no examples, UserError when there is no such teacher, ParamsError when the
    student shall have more layers, heads or channels than it has.
    """
    from tasks.compress.assess import assessor, named, weight_bytes
    from tasks.compress.distillation_report import write_report
    from tasks.compress.lessons import Limits
    from tasks.lm.model import load, save
    from tasks.lm.peft import merged, parameter_counts
    from tasks.lm.train import forget_checkpoints

    examples = _examples(train_data, None)
    held_out = _examples(validation_data, params.task)[: params.held_out]
    if params.examples is not None:
        examples = random.Random(context.seed).sample(examples, min(params.examples, len(examples)))
    context.track.dataset("examples", train_data, hash_file(train_data), len(examples))
    teacher = merged(load(params.teacher.source, context.compute, params.teacher.revision, trainable=True))
    limits = Limits(params.max_prompt_tokens, params.max_response_tokens, params.batch_size)
    assess = assessor(params.toxicity, limits, context.compute)
    lessons = _lessons(params, teacher, examples, held_out, limits, context)
    found = {"teacher": assess(teacher, held_out)}
    student, training = _taught(params, teacher, lessons, params.schedule, _beside(context, "student"))
    found["student"] = assess(student, held_out)
    if params.control is not None:
        few = lessons.first(params.control.examples)
        changes = {"epochs": params.control.epochs, "evaluations": 1}
        schedule = params.schedule.model_copy(update=changes)
        for name, taught in (("taught", _taught), ("untaught", _untaught)):
            control, _ = taught(params, teacher, few, schedule, _beside(context, name))
            found[name] = assess(control, held_out)
    context.first_alone()
    parameters, parameters_teacher = parameter_counts(student)[1], parameter_counts(teacher)[1]
    metrics: dict[str, Any] = {
        **found["student"].scores,
        **{
            key: value
            for name, each in found.items()
            if name != "student"
            for key, value in named(each.scores, name).items()
        },
        "parameters": parameters,
        "parameters_teacher": parameters_teacher,
        "parameters_ratio": parameters / parameters_teacher,
        "bytes": weight_bytes(student),
        "bytes_teacher": weight_bytes(teacher),
        "bytes_ratio": weight_bytes(student) / weight_bytes(teacher),
        "loss_before": training.evaluations[0]["eval_loss"],
        "loss_after": training.evaluations[-1]["eval_loss"],
        "examples": len(examples),
        "steps": training.steps,
        "held_out": len(held_out),
    }
    save(student, model)
    write_report(reports, metrics, training)
    context.track.figure("distill", reports / "distill.png")
    speed, speed_teacher = found["student"].tokens_per_second, found["teacher"].tokens_per_second
    context.track.metrics(
        {
            "seconds": training.seconds,
            "peak_memory_mb": training.peak_memory / 2**20,
            "answer_tokens_per_second": speed,
            "answer_tokens_per_second_teacher": speed_teacher,
            "speed_ratio": speed / speed_teacher,
        }
    )
    for name in found:
        forget_checkpoints(_beside(context, name))
    shutil.rmtree(_foreseen(context), ignore_errors=True)
    return metrics


class _Lessons(NamedTuple):
    """Prompts and labels as token ids, and what the teacher foresees at the labels."""

    pairs: "list[Pair]"
    references: "list[Pair]"  # the same prompts with their references
    held_out: "list[Pair]"
    foreseen: "Foreseen | None"  # None: the student answers itself

    def first(self, count: int) -> "_Lessons":
        """The first so many of them."""
        return self._replace(pairs=self.pairs[:count], references=self.references[:count])


def _lessons(
    params: Params,
    teacher: "LanguageModel",
    examples: Sequence["Example"],
    held_out: Sequence["Example"],
    limits: "Limits",
    context: Context,
) -> _Lessons:
    from tasks.compress.lessons import own_answers, references
    from tasks.compress.teacher import foresee, state_bytes

    from_references = references(teacher, examples, limits)
    if params.labels == "reference":
        pairs, held_out_pairs = from_references, references(teacher, held_out, limits)
    else:
        some = context.place.part(examples), context.place.part(held_out)
        with context.progress(sum(map(len, some)), "distill: the teacher answers") as bar:
            pairs, held_out_pairs = (
                context.place.together(own_answers(teacher, each, limits, bar.advance)) for each in some
            )
    if params.method == "on_policy":
        return _Lessons(pairs, from_references, held_out_pairs, None)
    soft = params.soft
    keep_states = soft.states > 0 and state_bytes(teacher, pairs) <= soft.kept_gb * 1e9
    with context.place.first(), context.progress(len(pairs), "distill: the teacher foresees") as bar:
        foreseen = foresee(
            teacher,
            pairs,
            soft.temperature,
            soft.top_k,
            _foreseen(context),
            keep_states=keep_states,
            batch_size=params.batch_size,
            progress=bar.advance,
        )
    return _Lessons(pairs, from_references, held_out_pairs, foreseen)


def _student(params: Params, teacher: "LanguageModel", pairs: "Sequence[Pair]", seed: int) -> "LanguageModel":
    import torch

    from tasks.compress.shrink import fewer_units, from_scratch, narrower_heads
    from tasks.compress.sparse import input_norms
    from tasks.lm.structure import with_layers

    size = params.student
    torch.manual_seed(seed)
    width = teacher.model.config.hidden_size
    if size.start == "scratch":
        if params.method == "soft" and params.soft.states and size.width not in (None, width):
            raise ParamsError(
                f"distill.soft.states compares states of one width, but distill.student.width is {size.width} "
                f"and {params.teacher.source} is {width} wide; set soft.states to 0, or student.width to null"
            )
        return from_scratch(teacher, **size.model_dump(exclude={"start", "calibration"}))
    if size.width not in (None, width):
        raise ParamsError(
            f"distill.student.width is {size.width}, but the layers of {params.teacher.source} are "
            f"{width} wide; set it to null, or start from scratch"
        )
    shallow = with_layers(teacher, size.encoder, size.decoder)
    norms = input_norms(shallow, pairs[: size.calibration])
    student = fewer_units(shallow, heads=size.heads, channels=size.channels, norms=norms)
    return student if size.head_size is None else narrower_heads(student, size.head_size, norms)


def _taught(
    params: Params, teacher: "LanguageModel", lessons: _Lessons, schedule: Schedule, context: Context
) -> "tuple[LanguageModel, Training]":
    """A student that learnt with the teacher."""
    student = _student(params, teacher, lessons.pairs, context.seed)
    if lessons.foreseen is None:
        from tasks.compress.on_policy import train_on_policy

        training = train_on_policy(
            student,
            teacher,
            lessons.pairs,
            lessons.held_out,
            params.on_policy.model_dump(),
            params.max_response_tokens,
            schedule,
            params.learning_rate,
            context,
        )
        return student, training
    from tasks.compress.student import Weights, train_student

    training = train_student(
        student,
        teacher,
        lessons.pairs,
        lessons.foreseen,
        lessons.held_out,
        Weights(**params.soft.model_dump(exclude={"top_k", "kept_gb"})),
        schedule,
        params.learning_rate,
        context,
    )
    return student, training


def _untaught(
    params: Params, teacher: "LanguageModel", lessons: _Lessons, schedule: Schedule, context: Context
) -> "tuple[LanguageModel, Training]":
    """A student, of the same weights at the start, that learnt from references alone."""
    from tasks.lm.train import train

    student = _student(params, teacher, lessons.pairs, context.seed)
    pairs = lessons.references
    training = train(
        student,
        len(pairs),
        lambda draw: pairs[draw % len(pairs)],
        lessons.held_out,
        schedule,
        params.learning_rate,
        context,
    )
    return student, training


def _examples(path: Path, task: str | None) -> "list[Example]":
    from tasks.data.records import read_examples

    found = read_examples(path, None if task is None else [task])
    if not found:
        wanted = "examples" if task is None else f"example of {task}, which is distill.task"
        raise DataError(f"{path} has no {wanted}")
    return found


def _foreseen(context: Context) -> Path:
    """Where what the teacher foresees is written."""
    return context.work / "foreseen"


def _beside(context: Context, name: str) -> Context:
    """The context of one of several trainings in the same stage."""
    return replace(context, work=context.work / name)


if __name__ == "__main__":
    run_stage(
        "distill",
        Params,
        lambda params, context: distill(
            params,
            Path("data/examples/train.jsonl"),
            Path("data/examples/validation.jsonl"),
            Path("models/distill"),
            Path("reports/distill"),
            context,
        ),
        trains=True,
    )
