"""From sources to data: read, check, map, remove repeats, split, look for leaks, mix, and describe the result.

    python -m tasks.prepare

Writes the examples that models are tuned and tested on, the raw text that a base model is trained on, the rows
that were rejected, and a data card. Needs no network unless a source is on the hub.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from tasks.data import cluster
from tasks.data.recipes import (
    AnySource,
    ExampleRecorder,
    ExampleSource,
    FileExamples,
    HubExamples,
    Task,
    TextRecorder,
    TextSource,
    bytes_of,
    chunks_of,
    name_of,
    origins_of,
)
from tasks.data.records import SPLITS
from tasks.stage import Context, DataError, Section, run_stage

if TYPE_CHECKING:
    from tasks.data.card import Card, SourceFigures
    from tasks.data.corpus import Corpus, InOrder, Recorder, Rejects
    from tasks.data.duplicates import Mask
    from tasks.data.selection import Selection

Metrics = dict[str, int]
Share = Annotated[float, Field(ge=0, lt=1)]
Resemblance = Annotated[float, Field(ge=0.5, le=1)]

SHOWN = 2  # records of each task, and near repeats, on the card


class Deduplicate(Section):
    """`exact`: remove repeats. `near`: and texts with at least this Jaccard index of word 5-shingles."""

    exact: bool
    near: Resemblance | None


class Splits(Section):
    """Shares of the groups that are held out."""

    validation: Share
    test: Share

    @model_validator(mode="after")
    def _leave_something(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test leave nothing to train on")
        return self


class Text(Section):
    """Raw text for the base model; without sources the files are empty."""

    sources: tuple[TextSource, ...]
    validation: Share
    deduplicate: Deduplicate


class Params(Section):
    """The section `prepare` of params.yaml. `ray` is a cluster that works on the rows; null: processes here."""

    examples: Annotated[tuple[ExampleSource, ...], Field(min_length=1)]
    templates: Mapping[Task, Annotated[tuple[str, ...], Field(min_length=1)]]
    on_error: Literal["fail", "skip"]
    max_rejected_share: Share
    max_field_chars: PositiveInt
    deduplicate: Deduplicate
    splits: Splits
    leakage: Resemblance | None
    text: Text
    ray: str | None

    @field_validator("ray")
    @classmethod
    def _an_address(cls, address: str | None) -> str | None:
        if address is not None and not cluster.is_address(address):
            raise ValueError(f"{cluster.ADDRESSES}, or null")
        return address

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for sources in (self.examples, self.text.sources):
            names = [name_of(source) for source in sources]
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two sources are called {repeated[0]}")
        mapped = [source for source in self.examples if isinstance(source, FileExamples | HubExamples)]
        for source in mapped:
            if not {"input", "instruction"} & set(source.columns):
                raise ValueError(f"columns of {source.name} name neither input nor instruction")
            if "instruction" not in source.columns and source.task not in self.templates:
                raise ValueError(f"templates has none for {source.task}, and {source.name} has no instruction")
        asked = {source.task for source in mapped if "instruction" not in source.columns}
        if unused := sorted(set(self.templates) - asked):
            raise ValueError(f"no source uses the templates of {unused[0]}")
        if sum(source.weight is not None for source in self.examples) == 1:
            raise ValueError("one weight alone has no meaning: give two sources one, or none")
        if lacking := [
            name_of(s) for s in self.text.sources if s.kind != "synthetic" and "text" not in s.columns
        ]:
            raise ValueError(f"columns of text source {lacking[0]} name no text")
        return self


def prepare(
    params: Params, examples: Path, text: Path, rejects: Path, card: Path, plots: Path, context: Context
) -> Metrics:
    """Write the folders `examples` and `text`, the file `rejects`, the page `card` and its `plots`.

    Returns the figures of metrics/prepare.json. Raises DataError for data that is wrong.
    """
    from tasks.stage.files import new_folder

    with ExitStack() as stack:
        corpus, fresh, documents = _read(params, rejects, stack, context)
        chosen, read = _select(params, corpus, fresh, documents, context)
        with new_folder(examples) as folder:
            corpus.write(chosen.places, [folder / f"{split}.jsonl" for split in SPLITS])
        with new_folder(text) as folder:
            documents.write(read.places, [folder / f"{split}.jsonl" for split in SPLITS[:2]])
        page = _card(params, corpus, chosen, documents, read)
    page.write(card, plots)
    for source in (*page.sources, *page.text_sources):
        for file in source.files:
            if file.digest is not None:
                context.track.dataset(source.name, Path(file.name), file.digest, file.rows)
    context.track.figure("lengths", plots / "lengths.png")
    return page.metrics()


def _read(
    params: Params, rejects: Path, stack: ExitStack, context: Context
) -> tuple["Corpus", "Mask", "Corpus"]:
    """The examples, which of them have an id of their own, and the raw text; `stack` removes their files."""
    from tasks.data.corpus import Rejects, reject_repeated_ids
    from tasks.stage.files import new_file

    sources, texts = params.examples, params.text.sources
    skip, longest = params.on_error == "skip", params.max_field_chars
    with _workers(params.ray, context) as in_order, new_file(rejects) as file:
        rejected = Rejects(list(map(origins_of, sources)), file, skip=skip)
        text_rejected = Rejects(list(map(origins_of, texts)), file, skip=skip)
        record = ExampleRecorder(sources, params.templates, longest)
        sign = params.deduplicate.near is not None or params.leakage is not None
        corpus = _gather(in_order, sources, record, sign, rejected, "examples", longest, context)
        stack.callback(corpus.close)
        fresh = reject_repeated_ids(corpus, rejected)
        sign = params.text.deduplicate.near is not None
        record_text = TextRecorder(texts, longest)
        documents = _gather(in_order, texts, record_text, sign, text_rejected, "text", longest, context)
        stack.callback(documents.close)
    for of_sources, made in ((sources, corpus), (texts, documents)):
        _check_counts(of_sources, made, params.max_rejected_share, rejects)
    return corpus, fresh, documents


def _select(
    params: Params, corpus: "Corpus", fresh: "Mask", documents: "Corpus", context: Context
) -> tuple["Selection", "Selection"]:
    """Which examples and which documents are used, and where."""
    from tasks.data.duplicates import BANDS
    from tasks.data.selection import held_out_groups, select_examples, select_text

    thresholds = (params.deduplicate.near, params.leakage, params.text.deduplicate.near)
    searches = sum(threshold is not None for threshold in thresholds)
    with context.progress(BANDS * searches, "prepare: near repeats") as bar:
        chosen = select_examples(
            corpus,
            fresh,
            exact=params.deduplicate.exact,
            near=params.deduplicate.near,
            validation=params.splits.validation,
            test=params.splits.test,
            leakage=params.leakage,
            weights=[source.weight for source in params.examples],
            bar=bar,
        )
        read = select_text(
            documents,
            exact=params.text.deduplicate.exact,
            near=params.text.deduplicate.near,
            validation=params.text.validation,
            held_out=held_out_groups(corpus, chosen),
            bar=bar,
        )
    return chosen, read


@contextmanager
def _workers(address: str | None, context: Context) -> Iterator["InOrder"]:
    """Where rows are worked on: processes of this machine, or a Ray cluster."""
    if address is None:
        from tasks.data.corpus import in_order

        yield partial(in_order, workers=context.compute.threads or os.cpu_count() or 1)
    else:
        with cluster.joined(address):
            yield cluster.in_order


def _gather(
    in_order: "InOrder",
    sources: Sequence[AnySource],
    recorder: "Recorder",
    sign: bool,
    rejects: "Rejects",
    what: str,
    longest: int,
    context: Context,
) -> "Corpus":
    """Read, map and check the rows of `sources`, with signatures if `sign`."""
    from tasks.data.corpus import convert, gather

    chunks = chain.from_iterable(
        chunks_of(source, position, context.seed, longest) for position, source in enumerate(sources)
    )
    batches = in_order(partial(convert, recorder, sign), chunks)
    with context.progress(bytes_of(sources) or None, f"prepare: bytes of {what}") as bar:
        return gather(batches, len(sources), rejects, context.work / f"{what}.jsonl", bar)


def _check_counts(sources: Sequence[AnySource], corpus: "Corpus", most: float, rejects: Path) -> None:
    """Raise DataError when a source has no rows, or more than the share `most` of them is bad."""
    for source, read, bad in zip(sources, corpus.read, corpus.rejected, strict=True):
        if not read:
            names = ", ".join(origin.shown for origin in origins_of(source))
            raise DataError(f"{names}: empty, expected at least one row (source {name_of(source)})")
        if bad > most * read:
            raise DataError(
                f"source {name_of(source)}: {bad:,} of {read:,} rows are bad ({bad / read:.1%}), allowed are "
                f"{most:.1%} (prepare.max_rejected_share); the reasons are in {rejects}"
            )


def _card(
    params: Params, corpus: "Corpus", chosen: "Selection", documents: "Corpus", read: "Selection"
) -> "Card":
    import numpy as np

    from tasks.data.card import Card

    rows_of = {
        task: np.flatnonzero((corpus.rows["task"] == number) & (chosen.places >= 0))
        for task, number in sorted(zip(corpus.tasks, range(len(corpus.tasks)), strict=True))
    }
    rows_of = {task: rows for task, rows in rows_of.items() if len(rows)}
    return Card(
        sources=_figures(params.examples, corpus, chosen),
        text_sources=_figures(params.text.sources, documents, read),
        counts={task: chosen.counts(rows, len(SPLITS)) for task, rows in rows_of.items()},
        text_counts=read.counts(np.arange(len(documents)), 2),
        input_words={task: corpus.rows["input_words"][rows] for task, rows in rows_of.items()},
        output_words={task: corpus.rows["output_words"][rows] for task, rows in rows_of.items()},
        text_words=documents.rows["input_words"][read.places >= 0],
        near=[
            f"{corpus.record(row)['id']} is near {corpus.record(earlier)['id']} "
            f"({corpus.resemblance(row, earlier):.2f})"
            for row, earlier in chosen.near[:SHOWN]
        ],
        shown={task: [corpus.record(int(row)) for row in rows[:SHOWN]] for task, rows in rows_of.items()},
    )


def _figures(sources: Sequence[AnySource], corpus: "Corpus", selection: "Selection") -> list["SourceFigures"]:
    """What became of the rows of each source."""
    from tasks.data.card import FileFigures, SourceFigures

    count = partial(corpus.count, sources=len(sources))
    columns = zip(
        map(name_of, sources),
        corpus.read,
        corpus.rejected,
        count(selection.repeats),
        count(selection.near_mask),
        count(selection.left_out),
        count(selection.places >= 0),
        [
            [
                FileFigures(origin.shown, corpus.count_of_origin(position, number), origin.digest())
                for number, origin in enumerate(origins_of(source))
            ]
            for position, source in enumerate(sources)
        ],
        strict=True,
    )
    return [SourceFigures(*column) for column in columns]


if __name__ == "__main__":
    run_stage(
        "prepare",
        Params,
        lambda params, context: prepare(
            params,
            Path("data/examples"),
            Path("data/text"),
            Path("data/rejects.jsonl"),
            Path("reports/data.md"),
            Path("reports/data"),
            context,
        ),
        torch=False,
    )
