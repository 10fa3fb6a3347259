"""The stage `feedback`: answers to the same prompt, and which of two is preferred.

The corpus oracle ranks answers of the fine-tuned model, topped up with controlled faults; or a file holds what
people ranked: many completions, or two as they are. Either way the reward model learns from pairs.

    python -m tasks.feedback
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tasks.data.mapping import RankingColumns
from tasks.data.records import Comparisons
from tasks.data.sources import Files, Hub
from tasks.stage import Context, DataError, Section, run_stage
from tasks.stage.files import new_folder, write_text
from tasks.stage.fingerprint import hash_file

if TYPE_CHECKING:
    from tasks.data.records import Example

Share = Annotated[float, Field(ge=0, le=1)]


class Prompts(Section):
    """How many prompts to compare answers of; `test` ones are of the validation examples."""

    train: PositiveInt
    test: PositiveInt


class Oracle(Section):
    """The fine-tuned model answers prompts of one `task`, `answers` times each; the corpus oracle ranks.

    Controlled faults are added up to `completions` for each prompt, and the share `flipped` of the pairs is
    turned round. A prompt longer than `max_prompt_tokens` loses its middle.
    """

    kind: Literal["oracle"]
    task: str
    prompts: Prompts
    answers: PositiveInt
    temperature: PositiveFloat
    max_prompt_tokens: PositiveInt
    max_response_tokens: PositiveInt
    batch_size: PositiveInt
    completions: Annotated[int, Field(ge=2)]
    flipped: NonNegativeFloat


class Rankings(Section):
    """Rankings made elsewhere: of many completions or of two. The share `test` of the groups is held out.

    Of a row that is no ranking `on_error: skip` keeps count, up to `max_rejected_share` of all rows.
    """

    kind: Literal["rankings"]
    rows: Annotated[Files | Hub, Field(discriminator="kind")]
    columns: RankingColumns
    test: Share
    max_field_chars: PositiveInt
    on_error: Literal["fail", "skip"]
    max_rejected_share: Share


class Params(Section):
    """The section `feedback` of params.yaml. `shown` prompts stand in the report."""

    source: Annotated[Oracle | Rankings, Field(discriminator="kind")]
    shown: PositiveInt


def feedback(
    params: Params,
    train_data: Path,
    validation_data: Path,
    model: Path,
    data: Path,
    reports: Path,
    context: Context,
) -> Mapping[str, Any]:
    """Write train.jsonl and test.jsonl with comparisons to `data`, and a page about them; return the metrics.

    Raises DataError for data that is wrong, or when no two completions differ in rank.
    """
    rejected = 0
    if isinstance(params.source, Oracle):
        train = _ranked_by_oracle(params.source, train_data, model, params.source.prompts.train, context)
        test = _ranked_by_oracle(params.source, validation_data, model, params.source.prompts.test, context)
    else:
        train, test, rejected = _ranked_elsewhere(params.source)
    for found, part in ((train, "train"), (test, "test")):
        if not found:
            raise DataError(f"feedback: no two completions of a {part} prompt differ in rank")
    with new_folder(data) as temporary:
        for found, part in ((train, "train"), (test, "test")):
            write_text(temporary / f"{part}.jsonl", "".join(each.line() + "\n" for each in found))
    for part, found in (("train", train), ("test", test)):
        path = data / f"{part}.jsonl"
        context.track.dataset(f"comparisons_{part}", path, hash_file(path), len(found))
    metrics = _figures("train", train) | _figures("test", test) | {"rejected_rows": rejected}
    with new_folder(reports) as temporary:
        write_text(temporary / "summary.md", _summary(metrics, train, test[: params.shown]))
    return metrics


def _ranked_by_oracle(
    source: Oracle, examples: Path, model: Path, prompts: int, context: Context
) -> list[Comparisons]:
    from tasks.data.comparisons import compared, completions, corpus_oracle
    from tasks.data.records import read_examples

    asked = read_examples(examples, [source.task])[:prompts]
    if not asked:
        raise DataError(f"feedback.source.task is {source.task}, but {examples} has no example of it")
    draws = [random.Random(f"{context.seed}:{example.id}") for example in asked]
    answers = _answers(source, asked, model, context)
    made = [
        list(completions(example, some, source.completions, draw))
        for example, some, draw in zip(asked, answers, draws, strict=True)
    ]
    worth = corpus_oracle(asked, [[text for _, text in each] for each in made])
    found = [
        compared(example, each, values, source.flipped, draw)
        for example, each, values, draw in zip(asked, made, worth, draws, strict=True)
    ]
    return [each for each in found if each is not None]


def _answers(source: Oracle, asked: "Sequence[Example]", model: Path, context: Context) -> list[list[str]]:
    from tasks.lm.model import load
    from tasks.lm.peft import merged_to_answer
    from tasks.lm.respond import respond

    prompts = [example.prompt for example in asked for _ in range(source.answers)]
    with context.progress(len(prompts), f"{context.name}: answers") as bar:
        found = iter(
            respond(
                merged_to_answer(load(model, context.compute)),
                prompts,
                {
                    "do_sample": True,
                    "temperature": source.temperature,
                    "top_k": 0,
                    "max_new_tokens": source.max_response_tokens,
                },
                batch_size=source.batch_size,
                seed=context.seed,
                max_prompt_tokens=source.max_prompt_tokens,
                progress=bar.advance,
            )
        )
    return [[next(found) for _ in range(source.answers)] for _ in asked]


def _ranked_elsewhere(source: Rankings) -> tuple[list[Comparisons], list[Comparisons], int]:
    from tasks.data.comparisons import as_ranked
    from tasks.data.keys import key

    train: list[Comparisons] = []
    test: list[Comparisons] = []
    problems: list[str] = []
    rows = 0
    for name, row in _rows(source, problems):
        rows += 1
        made = as_ranked(row, name)
        if made is not None:
            (test if key(made.group) / 2.0**64 < source.test else train).append(made)
    if problems and source.on_error == "fail":
        raise DataError(f"{problems[0]}; mend the row, or set feedback.source.on_error: skip")
    if len(problems) > source.max_rejected_share * (rows + len(problems)):
        raise DataError(
            f"{len(problems)} of {rows + len(problems)} rows are no rankings, more than "
            f"{source.max_rejected_share:.1%} (feedback.source.max_rejected_share); the first: {problems[0]}"
        )
    return train, test, len(problems)


def _rows(source: Rankings, problems: list[str]) -> "Iterator[tuple[str, Any]]":
    """(name, ranking) of each good row; what is wrong with the others goes to `problems`."""
    from tasks.data.mapping import ranking
    from tasks.data.sources import Fault, origins, read

    places = origins(source.rows)
    for chunk in read(source.rows, 0, source.columns.needed, source.max_field_chars):
        origin = places[chunk.origin]
        for number, row in chunk.numbered():
            try:
                made = ranking(row, source.columns, source.max_field_chars)
            except Fault as fault:
                where = f"{origin.shown} {origin.unit} {number}"
                where += "" if fault.column is None else f", column {fault.column}"
                problems.append(f"{where}: found {fault.found}, expected {fault.expected}")
                if source.on_error == "fail":
                    return
                continue
            yield f"{source.rows.name}:{chunk.origin}:{number}", made


def _figures(part: str, found: Sequence[Comparisons]) -> dict[str, float]:
    pairs = sum(len(each.pairs) for each in found)
    kinds = Counter(kind for each in found for kind in each.kinds)
    return {
        f"{part}_prompts": len(found),
        f"{part}_completions": kinds.total(),
        f"{part}_pairs": pairs,
        f"{part}_flipped": sum(sum(each.flipped) for each in found) / pairs,
        **{f"{part}_{kind}": count for kind, count in sorted(kinds.items())},
    }


def _summary(metrics: Mapping[str, float], train: Sequence[Comparisons], shown: Sequence[Comparisons]) -> str:
    kinds = sorted({kind for each in [*train, *shown] for kind in each.kinds})
    names = ["prompts", "completions", "pairs", "flipped", *kinds]
    lines = [
        "# Feedback",
        "",
        "Completions of the same prompt, in pairs: which of the two is preferred. `flipped` is the share of",
        "pairs that are known to be labelled the wrong way round.",
        "",
        "| | train | test |",
        "| --- | ---: | ---: |",
    ]
    for name in names:
        cells = [metrics.get(f"{part}_{name}", 0) for part in ("train", "test")]
        lines.append(f"| {name} | {_number(cells[0])} | {_number(cells[1])} |")
    for each in shown:
        wins = Counter(better for better, _ in each.pairs)
        lines += [
            "",
            f"## {each.id}",
            "",
            "```",
            each.prompt,
            "```",
            "",
            "| preferred to | kind | completion |",
        ]
        lines.append("| ---: | --- | --- |")
        for place in sorted(range(len(each.completions)), key=lambda place: -wins[place]):
            text = " ".join(each.completions[place].split()).replace("|", "\\|")
            lines.append(f"| {wins[place]} | {each.kinds[place]} | {text} |")
    return "\n".join([*lines, ""])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    run_stage(
        "feedback",
        Params,
        lambda params, context: feedback(
            params,
            Path("data/examples/train.jsonl"),
            Path("data/examples/validation.jsonl"),
            Path("models/finetune"),
            Path("data/feedback"),
            Path("reports/feedback"),
            context,
        ),
    )
