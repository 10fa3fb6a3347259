"""From a row of columns to a record: which column is what, and which of several templates puts the question.

A field of a record is a column ("summary") or text with columns in braces ("{question}\\n{choices}").
"""

import string
from collections.abc import Mapping
from functools import cache
from itertools import takewhile
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from tasks.data.keys import key, normalise
from tasks.data.records import Example, Ranking, Split
from tasks.data.sources import Fault, Row, shown
from tasks.stage import Section


def _well_formed(spec: str) -> str:
    if not columns_of(spec):
        raise ValueError("names no column")
    return spec


Spec = Annotated[str, AfterValidator(_well_formed)]
ExampleColumns = Mapping[Literal["id", "group", "instruction", "input"], Spec]


class RankingColumns(Section):
    """The columns of a ranking.

    `completions` are best first: a column for each, or one that holds a list. `ties` names a column with the
    positions of completions that are as good as the one after them (null: there are no ties). `prompt` names a
    column, or is null when every completion starts with the prompt: it then ends with the last `marker` that
    all of them share. Without a `group` column equal prompts make a group.
    """

    completions: Annotated[tuple[str, ...], Field(min_length=1)]
    ties: str | None
    prompt: Spec | None
    marker: str | None
    group: Spec | None

    @model_validator(mode="after")
    def _one_way_to_the_prompt(self) -> Self:
        if (self.prompt is None) == (self.marker is None):
            raise ValueError("give either prompt or marker")
        return self

    @property
    def needed(self) -> frozenset[str]:
        """The columns that a row must have."""
        specs = [spec for spec in (self.prompt, self.group) if spec is not None]
        ties = [] if self.ties is None else [self.ties]
        return frozenset([*self.completions, *ties]).union(*map(columns_of, specs))


@cache
def _pieces(spec: str) -> tuple[tuple[str, str | None], ...]:
    """(text, column after it) of a template, or the one column that `spec` names.

    Raises ValueError for braces that do not match and for anything in them but a column's name.
    """
    if "{" not in spec and "}" not in spec:
        return (("", spec),)
    pieces = tuple(string.Formatter().parse(spec))
    if any(column == "" or form or conversion for _, column, form, conversion in pieces):
        raise ValueError("expected only column names in braces")
    return tuple((text, column) for text, column, _, _ in pieces)


def columns_of(spec: str) -> frozenset[str]:
    """The columns that a field's spec names. Raises ValueError when it is malformed."""
    return frozenset(column for _, column in _pieces(spec) if column is not None)


def fill(spec: str, row: Row, longest: int) -> str:
    """The text of a field. Raises Fault when a column is missing, not text or a number, or over `longest`."""
    return "".join(text + (_text(row, column, longest) if column else "") for text, column in _pieces(spec))


def answers(spec: str, row: Row, longest: int) -> list[str]:
    """The text of a field, or each of the texts in a column that holds a list. Raises Fault as `fill`."""
    if isinstance(row.get(spec), list):
        return [_text({spec: item}, spec, longest) for item in row[spec]]
    return [fill(spec, row, longest)]


def _text(row: Row, column: str, longest: int) -> str:
    if column not in row:
        raise Fault(column, f"no such column (the row has {', '.join(row)[:100]})", "text")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:  # NaN
        raise Fault(column, shown(value), "text or a number")
    text = str(value)
    if len(text) > longest:
        raise Fault(column, f"{len(text):,} characters", f"at most {longest:,} (prepare.max_field_chars)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Fault(
            column, f"{shown(text[error.start])} at character {error.start + 1}", "text in UTF-8"
        ) from None
    return text


AnyRecord = TypeVar("AnyRecord", Example, Ranking)


def _checked(record: type[AnyRecord], fields: Mapping[str, Any], columns: Mapping[str, str]) -> AnyRecord:
    """The record of `fields`. Raises Fault naming the column behind the first field that is wrong."""
    try:
        return record(**fields)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        blank = fault["type"] == "string_pattern_mismatch"
        expected = "text that is not blank" if blank else fault["msg"].removeprefix("Value error, ")
        place = str(fault["loc"][0]) if fault["loc"] else "completions"
        raise Fault(columns.get(place, place), shown(fault["input"]), expected) from None


def example(
    row: Row,
    columns: ExampleColumns,
    outputs: tuple[str, ...],
    templates: tuple[str, ...],
    *,
    source: str,
    place: str,
    task: str,
    split: Split | None,
    longest: int,
) -> tuple[Example, str, str]:
    """The example that a row makes, the question that is the row's own ("" when a template puts it), and what
    it is about: the input, or the question when there is none, normalised.

    Its id is the name of the `source` and the column `id`, or its `place`. Which of `templates` is used depends
    on the input alone. Without a `group` column equal inputs make a group. Raises Fault when a field is not
    what an Example needs.
    """
    values = {field: fill(spec, row, longest) for field, spec in columns.items()}
    question, text = values.get("instruction", ""), values.get("input", "")
    about = normalise(text) or normalise(question)
    fields = {
        "id": f"{source}:{values.get('id', place)}",
        "task": task,
        "instruction": question if "instruction" in columns else templates[key(task, about) % len(templates)],
        "input": text,
        "outputs": tuple(answer for spec in outputs for answer in answers(spec, row, longest)),
        "group": values.get("group", f"{key(about):016x}"),
        "split": split,
    }
    if not about:
        column = columns.get("input", columns.get("instruction"))
        raise Fault(column, "no text", "text that is not blank")
    behind: dict[str, str] = dict(columns.items()) | {"outputs": ", ".join(outputs)}
    return _checked(Example, fields, behind), question, about


def ranking(row: Row | Fault, columns: RankingColumns, longest: int) -> Ranking:
    """The ranking that a row makes. Raises Fault when a field is not what a Ranking needs."""
    if isinstance(row, Fault):
        raise row
    completions = [text for column in columns.completions for text in answers(column, row, longest)]
    if columns.prompt is not None:
        prompt = fill(columns.prompt, row, longest)
    else:
        assert columns.marker is not None
        prompt = _shared_start(completions, columns.marker)
        if not prompt:
            expected = f"texts that share a start which ends with {shown(columns.marker)}"
            raise Fault(columns.completions[0], shown(completions[0]), expected)
        completions = [completion[len(prompt) :] for completion in completions]
    group = fill(columns.group, row, longest) if columns.group else f"{key(normalise(prompt)):016x}"
    fields = {
        "prompt": prompt.strip(),
        "completions": tuple(completion.strip() for completion in completions),
        "group": group,
        "ties": () if columns.ties is None else row.get(columns.ties, ()),
    }
    return _checked(
        Ranking, fields, {"completions": ", ".join(columns.completions), "ties": columns.ties or ""}
    )


def _shared_start(texts: list[str], marker: str) -> str:
    """What all texts start with, up to and with the last `marker` in it; "" without one."""
    shared = zip(*texts, strict=False)
    length = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, shared))
    start, found, _ = texts[0][:length].rpartition(marker)
    return start + found
