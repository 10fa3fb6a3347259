"""Stage `evaluate`: answer the test prompts with every model variant, and score the answers.

Scores the main task for each variant (a model, with or without worked examples in its prompt) beside three
baselines that need no model, every task for the variants without such examples (what tuning gained and what it
forgot), held-out against seen material, and a grid of decoding settings, with 95 % bootstrap intervals. Where
`alignment` is set, two variants also answer by chance, to compare toxicity before and after.

    python -m tasks.evaluate
"""

import difflib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from tasks.lm.engine_settings import EngineSettings
from tasks.metrics.detector import Detector, scorer
from tasks.stage import Context, DataError, ParamsError, Section, run_stage

if TYPE_CHECKING:
    from tasks.data.records import Example
    from tasks.lm.model import LanguageModel
    from tasks.metrics.bootstrap import Array
    from tasks.metrics.measures import Measures
    from tasks.metrics.results import Answered, Answers

    Voice = Callable[[Sequence[Sequence[int]], Mapping[str, Any]], list[list[int]]]


class Variant(Section):
    """A folder under models/, and how many worked examples its prompts begin with."""

    model: str
    shots: NonNegativeInt


class Examples(Section):
    """How many test examples are used, null for all."""

    main_task: PositiveInt | None
    other_tasks: PositiveInt | None
    decoding: PositiveInt | None


class Alignment(Section):
    """Two variants that sample `samples` answers to each prompt: what alignment changed, and what it cost.

    `examples` null: all of the main task's. `reward` names a folder under models/ (a sequence classifier).
    """

    before: str
    after: str
    examples: PositiveInt | None
    samples: PositiveInt
    generation: dict[str, Any]
    reward: str | None

    @model_validator(mode="after")
    def _samples(self) -> Self:
        if self.before == self.after:
            raise ValueError(f"before and after are both {self.before}; name two variants")
        if self.generation.get("do_sample") is not True:
            raise ValueError("generation with do_sample: true: greedy answers hide what a model seldom says")
        return self


class Params(Section):
    """The section `evaluate` of params.yaml.

    With an `engine` (vLLM) that answers where it can: causal models whose weights are whole, without beams.
    """

    task: str
    tuned: str
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    examples: Examples
    generation: dict[str, Any]
    decoding: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    batch_size: PositiveInt
    engine: EngineSettings | None
    max_prompt_tokens: PositiveInt
    toxicity: Detector
    alignment: Alignment | None
    bootstrap_samples: PositiveInt
    sample_rows: PositiveInt

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        from tasks.metrics.report import NOT_VARIANTS

        named = {"tuned": self.tuned}
        if self.alignment is not None:
            named |= {"alignment.before": self.alignment.before, "alignment.after": self.alignment.after}
        for key, name in named.items():
            if name not in self.variants:
                raise ValueError(f"{key} is {name}, which is none of the variants ({', '.join(self.variants)})")
            if self.variants[name].shots:
                raise ValueError(f"{key} is {name}, which has shots; name a variant without")
        for name in NOT_VARIANTS:
            if name in self.variants:
                raise ValueError(f"variants: {name} is a part of the report; give the variant another name")
        return self


def evaluate(params: Params, examples: Path, models: Path, report: Path, context: Context) -> dict[str, Any]:
    """Score all variants on `examples`/test.jsonl, write `report`, return what metrics/evaluate.json holds.

    Raises:
        DataError: a model folder or the main task is missing.
        ParamsError: a decoding setting is no field of GenerationConfig, or does not go with the others.
    """
    from tasks.data.records import read_examples
    from tasks.metrics.results import results

    _check_models(params, models)
    _check_generation(params)
    toxicity = _toxicity(params.toxicity, params.batch_size, context)
    test_file = examples / "test.jsonl"
    everything = read_examples(test_file)
    digest = hashlib.md5(test_file.read_bytes(), usedforsecurity=False).hexdigest()
    context.track.dataset("test", test_file, digest, len(everything))

    test = chosen(everything, params)
    train = read_examples(examples / "train.jsonl", tasks=[params.task])
    answered = _answer(params, test, train, models, context)
    sets = [*answered.main, *answered.baselines, *answered.decoding, *chain(*answered.tasks.values())]
    with context.progress(len(sets), "scoring answers") as bar:
        metrics = results(
            test, answered, params.tuned, toxicity, params.bootstrap_samples, context.seed, bar.advance
        )
    if params.alignment is not None:
        metrics["alignment"] = _align(params, params.alignment, test[params.task], models, toxicity, context)
    rows = _side_by_side(test[params.task], answered, params.sample_rows)
    _write_report(metrics, rows, report, context)
    return metrics


def chosen(examples: Sequence["Example"], params: Params) -> dict[str, list["Example"]]:
    """Return the examples to use by task, the main one first: the same ones whatever else is in the file.

    They are the first by a hash of their id. Raises DataError when the main task is not there.
    """
    from xxhash import xxh64_hexdigest

    by_task: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: (xxh64_hexdigest(example.id.encode()), example.id)):
        by_task.setdefault(example.task, []).append(example)
    if params.task not in by_task:
        known = ", ".join(sorted(by_task)) or "none"
        raise DataError(f"evaluate.task is {params.task}, but the tasks of the test examples are: {known}")
    main = by_task.pop(params.task)[: params.examples.main_task]
    return {params.task: main} | {
        task: by_task[task][: params.examples.other_tasks] for task in sorted(by_task)
    }


def shot_prompts(
    lm: "LanguageModel", examples: Sequence["Example"], shots: Sequence["Example"], max_tokens: int
) -> list[str]:
    """Return each prompt after the worked `shots`, or after the last of them that fit into `max_tokens`."""
    from tasks.lm.collate import encode_prompts

    worked = [f"{shot.prompt}\n{shot.reference}" for shot in shots]
    prompts = ["\n\n".join([*worked, example.prompt]) for example in examples]
    if shots:
        too_long = [row for row, ids in enumerate(encode_prompts(lm, prompts)) if len(ids) > max_tokens]
        fewer = shot_prompts(lm, [examples[row] for row in too_long], shots[1:], max_tokens) if too_long else []
        for row, prompt in zip(too_long, fewer, strict=True):
            prompts[row] = prompt
    return prompts


def _check_models(params: Params, models: Path) -> None:
    for name, variant in params.variants.items():
        if not (models / variant.model).is_dir():
            raise DataError(
                f"{models / variant.model} is missing: run the stage that makes it, "
                f"or take {name} out of evaluate.variants"
            )
    reward = params.alignment.reward if params.alignment is not None else None
    if reward is not None and not (models / reward).is_dir():
        raise DataError(
            f"{models / reward} is missing: run the stage that makes it, "
            "or set evaluate.alignment.reward to null"
        )


def _check_generation(params: Params) -> None:
    settings = {"generation": params.generation}
    settings |= {f"decoding.{name}": params.generation | setting for name, setting in params.decoding.items()}
    if params.alignment is not None:
        settings["alignment.generation"] = params.alignment.generation
    for where, setting in settings.items():
        check_generation(f"params.yaml: evaluate.{where}", setting)


def check_generation(where: str, setting: Mapping[str, Any]) -> None:
    """Raise ParamsError when `setting`, found at `where`, is not what GenerationConfig takes."""
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    for key in setting:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ParamsError(f"{where}.{key} is no field of GenerationConfig{hint}")
    try:
        GenerationConfig(**setting).validate(strict=True)
    except ValueError as error:
        raise ParamsError(f"{where}: {' '.join(str(error).split())}") from None


def _toxicity(detector: Detector, batch_size: int, context: Context) -> Callable[[Sequence[str]], "Measures"]:
    from tasks.metrics.measures import toxicity

    chances = scorer(detector, batch_size, context.compute)
    return lambda texts: toxicity(chances(texts), detector.toxic_from)


def _answer(
    params: Params,
    test: Mapping[str, Sequence["Example"]],
    train: Sequence["Example"],
    models: Path,
    context: Context,
) -> "Answered":
    """Let every model speak, each loaded once."""
    from tasks.lm.model import load
    from tasks.lm.peft import merged_to_answer
    from tasks.metrics.results import Answered

    main = test[params.task]
    others = {task: examples for task, examples in test.items() if task != params.task}
    plain = [name for name, variant in params.variants.items() if variant.shots == 0]
    shots = _draw_shots(params, train, context.seed)
    limit = len(main[: params.examples.decoding])
    answered = Answered({}, _baselines(main, train), {}, {})
    total = len(main) * len(params.variants) + sum(map(len, others.values())) * len(plain)
    with context.progress(total + limit * len(params.decoding), "answering test prompts") as bar:
        for folder in dict.fromkeys(variant.model for variant in params.variants.values()):
            lm = merged_to_answer(load(models / folder, context.compute))
            named = {name: variant for name, variant in params.variants.items() if variant.model == folder}
            with _voice(params, lm, context, bar.advance) as voice:
                speak = partial(_texts, params, lm, voice)
                for name, variant in named.items():
                    prompts = shot_prompts(lm, main, shots[: variant.shots], params.max_prompt_tokens)
                    texts = speak(prompts, params.generation)
                    answered.main[name] = _with_likelihoods(lm, prompts, main, texts, params)
                    if name in plain:
                        answered.tasks[name] = {
                            task: speak([example.prompt for example in examples], params.generation)
                            for task, examples in others.items()
                        }
                    if name == params.tuned:
                        for setting, fields in params.decoding.items():
                            asked = params.generation | fields
                            known = asked == params.generation
                            answered.decoding[setting] = (
                                texts[:limit] if known else speak(prompts[:limit], asked)
                            )
    return answered


@contextmanager
def _voice(
    params: Params, lm: "LanguageModel", context: Context, progress: Callable[[int], object]
) -> Iterator["Voice"]:
    """What answers prompts as `lm` would, both as token ids: an engine that can, or else `lm` itself."""
    from tasks.lm.engine import Engine, sampling_of, takes

    def own(prompts: Sequence[Sequence[int]], generation: Mapping[str, Any]) -> list[list[int]]:
        return sample_answers(lm, prompts, generation, params.batch_size, context.seed, progress)

    if params.engine is None or not takes(lm):
        yield own
        return
    fields = [params.generation, *(params.generation | each for each in params.decoding.values())]
    fields += [] if params.alignment is None else [params.alignment.generation]
    longest = params.max_prompt_tokens + max(each.get("max_new_tokens", 0) for each in fields)
    with Engine(params.engine, lm, longest, context.work / "engine") as engine:

        def voice(prompts: Sequence[Sequence[int]], generation: Mapping[str, Any]) -> list[list[int]]:
            sampling = sampling_of(generation)
            if sampling is None:
                return own(prompts, generation)
            answers = engine.answers(prompts, range(context.seed, context.seed + len(prompts)), sampling)
            progress(len(prompts))
            return answers.ids

        yield voice


def _texts(
    params: Params, lm: "LanguageModel", voice: "Voice", prompts: Sequence[str], generation: Mapping[str, Any]
) -> list[str]:
    from tasks.lm.collate import encode_prompts

    answers = voice(encode_prompts(lm, prompts, params.max_prompt_tokens), generation)
    return [text.strip() for text in lm.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _draw_shots(params: Params, train: Sequence["Example"], seed: int) -> list["Example"]:
    """The worked examples of all prompts: a variant with k shots takes the first k."""
    most = max(variant.shots for variant in params.variants.values())
    if most > len(train):
        raise DataError(
            f"evaluate.variants: {most} shots, but only {len(train)} train examples have the main task"
        )
    return random.Random(seed).sample(train, k=most)


def _with_likelihoods(
    lm: "LanguageModel",
    prompts: Sequence[str],
    examples: Sequence["Example"],
    texts: list[str],
    params: Params,
) -> "Answers":
    import numpy as np

    from tasks.lm.collate import encode_prompts, encode_responses
    from tasks.lm.respond import likelihoods
    from tasks.metrics.results import Answers

    found = likelihoods(
        lm,
        encode_prompts(lm, prompts, params.max_prompt_tokens),
        encode_responses(lm, [example.reference for example in examples]),
        batch_size=params.batch_size,
    )
    nll, tokens = np.array(found, dtype=np.float64).T
    return Answers(texts, nll, tokens)


def _baselines(main: Sequence["Example"], train: Sequence["Example"]) -> dict[str, list[str]]:
    from tasks.metrics.baselines import lead_1, longest_turn, nearest

    inputs = [example.input for example in main]
    rows = nearest(inputs, [example.input for example in train])
    return {
        "lead_1": [lead_1(text) for text in inputs],
        "longest_turn": [longest_turn(text) for text in inputs],
        "nearest_summary": [train[row].reference for row in rows],
    }


def _align(
    params: Params,
    wanted: Alignment,
    main: Sequence["Example"],
    models: Path,
    toxicity: Callable[[Sequence[str]], "Measures"],
    context: Context,
) -> dict[str, Any]:
    """Let both variants sample answers to the same prompts, one model in memory at a time, and compare them."""
    import numpy as np

    from tasks.lm.collate import encode_prompts
    from tasks.lm.model import load
    from tasks.lm.peft import merged_to_answer
    from tasks.lm.respond import likelihoods
    from tasks.metrics.alignment import Sampled, alignment

    examples = main[: wanted.examples]
    prompts = [example.prompt for example in examples for _ in range(wanted.samples)]
    texts: dict[str, list[str]] = {}
    answers: list[list[int]] = []  # of `after`
    nll: dict[str, list[float]] = {}  # of these answers
    with context.progress(4 * len(prompts), "sampling answers before and after alignment") as bar:
        for name in (wanted.after, wanted.before):
            lm = merged_to_answer(load(models / params.variants[name].model, context.compute))
            encoded = encode_prompts(lm, prompts, params.max_prompt_tokens)
            with _voice(params, lm, context, bar.advance) as voice:
                own = voice(encoded, wanted.generation)
            texts[name] = [text.strip() for text in lm.tokenizer.batch_decode(own, skip_special_tokens=True)]
            answers = answers or own
            found = likelihoods(lm, encoded, answers, batch_size=params.batch_size, progress=bar.advance)
            nll[name] = [likelihood.nll for likelihood in found]
    rewards = _rewards(wanted.reward, prompts, texts, models, params.batch_size, context)
    compared = alignment(
        examples,
        Sampled(texts[wanted.before], rewards.get(wanted.before)),
        Sampled(texts[wanted.after], rewards.get(wanted.after)),
        np.array(nll[wanted.before]) - np.array(nll[wanted.after]),
        toxicity,
        params.bootstrap_samples,
        context.seed,
    )
    return {"after": wanted.after, "before": wanted.before, **compared}


def sample_answers(
    lm: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    generation: Mapping[str, Any],
    batch_size: int,
    seed: int,
    progress: Callable[[int], object],
) -> list[list[int]]:
    """Return an answer to each prompt, both as token ids, its end token included."""
    import torch

    from tasks.lm.collate import batches_by_length, collate
    from tasks.lm.respond import generate

    answers: list[list[int]] = [[] for _ in prompts]
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for rows in batches_by_length([len(ids) for ids in prompts], batch_size):
            batch = collate(lm, [prompts[row] for row in rows], [[] for _ in rows])
            ids, mask = generate(lm, batch.prompt_ids, batch.prompt_mask, generation)
            for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
                answers[row] = row_ids[row_mask == 1].tolist()
            progress(len(rows))
    return answers


def _rewards(
    folder: str | None,
    prompts: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    models: Path,
    batch_size: int,
    context: Context,
) -> dict[str, "Array"]:
    """What the reward model gives the answers of each variant; empty without one."""
    if folder is None:
        return {}
    import numpy as np

    from tasks.lm.classifier import load_classifier, scores

    classifier = load_classifier(models / folder, context.compute)
    return {
        name: np.array(scores(classifier, prompts, answers, batch_size=batch_size))
        for name, answers in texts.items()
    }


def _side_by_side(examples: Sequence["Example"], answered: "Answered", limit: int) -> list[dict[str, str]]:
    """The first prompts with their reference and every variant's answer."""
    return [
        {
            "prompt": example.prompt,
            "reference": example.reference,
            **{name: answers.texts[row] for name, answers in answered.main.items()},
        }
        for row, example in enumerate(examples[:limit])
    ]


def _write_report(
    metrics: Mapping[str, Any], rows: list[dict[str, str]], report: Path, context: Context
) -> None:
    from tasks.metrics import figures
    from tasks.metrics.report import decoding_csv, scores_csv, summary, tasks_csv
    from tasks.stage.files import new_folder, write_text

    with new_folder(report) as folder:
        write_text(folder / "summary.md", summary(metrics))
        write_text(folder / "scores.csv", scores_csv(metrics))
        write_text(folder / "tasks.csv", tasks_csv(metrics))
        write_text(folder / "decoding.csv", decoding_csv(metrics))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(folder / "samples.jsonl", "".join(lines))
        figures.draw_scores(metrics, folder / "scores.png")
        figures.draw_tasks(metrics, folder / "tasks.png")
        figures.draw_alignment(metrics, folder / "alignment.png")
    context.track.table("samples", rows)
    context.track.figure("scores", report / "scores.png")
    context.track.figure("tasks", report / "tasks.png")
    if "alignment" in metrics:
        context.track.figure("alignment", report / "alignment.png")


if __name__ == "__main__":
    run_stage(
        "evaluate",
        Params,
        lambda params, context: evaluate(
            params, Path("data/examples"), Path("models"), Path("reports/evaluate"), context
        ),
    )
