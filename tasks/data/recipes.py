"""The sources of the `prepare` section, and how the rows of each become records."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints

from tasks.data.keys import key, normalise
from tasks.data.mapping import ExampleColumns, Spec, columns_of, example, fill
from tasks.data.records import Split
from tasks.data.sources import ROWS_IN_CHUNK, Chunk, Fault, Files, Hub, Origin, Row, origins, read
from tasks.stage import Section

Task = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]
Outputs = Annotated[tuple[Spec, ...], Field(min_length=1)]
TextColumns = Mapping[Literal["text", "group"], Spec]


class SyntheticExamples(Section):
    """The embedded office corpus, from the run's seed: three examples of each dialogue."""

    kind: Literal["synthetic"]
    dialogues: PositiveInt
    weight: PositiveFloat | None


class FileExamples(Files):
    """Rows of local files. `outputs` are the right answers, the first one to train on."""

    task: Task
    columns: ExampleColumns
    outputs: Outputs
    split: Split | None
    weight: PositiveFloat | None


class HubExamples(Hub):
    """Rows of a hub data set; else as FileExamples."""

    task: Task
    columns: ExampleColumns
    outputs: Outputs
    split: Split | None
    weight: PositiveFloat | None


class SyntheticText(Section):
    """Documents of the embedded office corpus, from the run's seed."""

    kind: Literal["synthetic"]
    documents: PositiveInt


class FileText(Files):
    """Raw text in local files; in a `txt` file each line is a document, in the column `line`."""

    columns: TextColumns


class HubText(Hub):
    """Raw text in a hub data set."""

    columns: TextColumns


ExampleSource = Annotated[SyntheticExamples | FileExamples | HubExamples, Field(discriminator="kind")]
TextSource = Annotated[SyntheticText | FileText | HubText, Field(discriminator="kind")]
AnySource = SyntheticExamples | FileExamples | HubExamples | SyntheticText | FileText | HubText


class Record(NamedTuple):
    """A checked row: its line, and what is needed to compare, group and count it."""

    line: str
    id: str
    task: str
    question: str
    text: str
    group: str
    pin: Split | None
    input_words: int
    output_words: int


def name_of(source: AnySource) -> str:
    """What a source is called in ids and reports."""
    return "synthetic" if isinstance(source, SyntheticExamples | SyntheticText) else source.name


def origins_of(source: AnySource) -> list[Origin]:
    """The files or the data set behind a source. Raises DataError when a file is missing."""
    if isinstance(source, SyntheticExamples | SyntheticText):
        return [Origin("synthetic corpus", "row", None)]
    return origins(source)


def bytes_of(sources: Sequence[AnySource]) -> int:
    """The bytes of all local files among `sources`."""
    files = (origin.path for source in sources for origin in origins_of(source))
    return sum(path.stat().st_size for path in files if path is not None)


def chunks_of(source: AnySource, position: int, seed: int, longest: int) -> Iterator[Chunk]:
    """The rows of the source that stands at `position`. Raises DataError as `sources.read`."""
    if isinstance(source, SyntheticExamples | SyntheticText):
        return _synthetic(source, position, seed)
    specs = list(source.columns.values())
    if isinstance(source, FileExamples | HubExamples):
        specs += source.outputs
    return read(source, position, frozenset().union(*map(columns_of, specs)), longest)


def _synthetic(source: SyntheticExamples | SyntheticText, position: int, seed: int) -> Iterator[Chunk]:
    from tasks.data.synthetic import documents, examples

    rows: Iterator[Row] = (
        ({"example": made} for made in examples(seed, source.dialogues))
        if isinstance(source, SyntheticExamples)
        else ({"text": made} for made in documents(seed, source.documents))
    )
    numbered = enumerate(rows, start=1)
    while some := list(islice(numbered, ROWS_IN_CHUNK)):
        yield Chunk(position, 0, some)


@dataclass(frozen=True)
class ExampleRecorder:
    """Makes the record of an example from a row of any of `sources`."""

    sources: tuple[AnySource, ...]
    templates: Mapping[str, tuple[str, ...]]
    longest: int

    def __call__(self, source: int, origin: int, number: int, row: Row) -> Record:
        """Raises Fault."""
        recipe = self.sources[source]
        if isinstance(recipe, FileExamples | HubExamples):
            made, question, about = example(
                row,
                recipe.columns,
                recipe.outputs,
                self.templates.get(recipe.task, ()),
                source=recipe.name,
                place=f"{origin + 1}.{number}",
                task=recipe.task,
                split=recipe.split,
                longest=self.longest,
            )
        else:
            made = row["example"]
            question = made.instruction
            about = normalise(made.input) or normalise(question)
        return Record(
            line=made.line(),
            id=made.id,
            task=made.task,
            question=question,
            text=about,
            group=made.group,
            pin=made.split,
            input_words=about.count(" ") + 1,
            output_words=len(made.reference.split()),
        )


@dataclass(frozen=True)
class TextRecorder:
    """Makes the record of a document from a row of any of `sources`."""

    sources: tuple[AnySource, ...]
    longest: int

    def __call__(self, source: int, origin: int, number: int, row: Row) -> Record:
        """Raises Fault."""
        recipe = self.sources[source]
        columns: TextColumns = recipe.columns if isinstance(recipe, FileText | HubText) else {"text": "text"}
        document = fill(columns["text"], row, self.longest)
        text = normalise(document)
        if not text:
            raise Fault(columns["text"], "no text", "text that is not blank")
        group = fill(columns["group"], row, self.longest) if "group" in columns else f"{key(text):016x}"
        return Record(
            line=json.dumps({"text": document}, ensure_ascii=False),
            id=f"{source}-{origin}-{number}",
            task="text",
            question="",
            text=text,
            group=group,
            pin=None,
            input_words=text.count(" ") + 1,
            output_words=0,
        )
