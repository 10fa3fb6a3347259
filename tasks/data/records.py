"""What one line of data is: an instruction example, a ranking of completions, or preferences between them.

Records are immutable and checked when they are made. They travel as JSON lines: one record a line, sorted keys,
UTF-8.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from tasks.stage import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Filled = Annotated[str, StringConstraints(pattern=r"\S")]
"""Text with at least one character that is not white space."""


_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


class Example(BaseModel):
    """One instruction example: what is asked, about what, and which answers are right.

    `instruction` may hold the placeholder `{input}`. `group` names what must never be divided between splits
    (a dialogue, a document, an author). `slots` are facts that an answer should contain, by name. `split` pins
    the example to one split; without it the hash of the group decides.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Filled
    task: Filled
    instruction: Filled
    input: str
    outputs: Annotated[tuple[Filled, ...], Field(min_length=1)]
    group: Filled
    slots: dict[str, str] = {}
    split: Split | None = None

    @property
    def prompt(self) -> str:
        """The text that a model is given."""
        if "{input}" in self.instruction:
            return self.instruction.replace("{input}", self.input)
        return f"{self.instruction}\n\n{self.input}"

    @property
    def reference(self) -> str:
        """The first right answer: the one to train on."""
        return self.outputs[0]

    def line(self) -> str:
        """The example as one JSON line, without the line end; equal examples give equal bytes."""
        return _ENCODER.encode(dict(self))


class Ranking(BaseModel):
    """Completions of one prompt, best first; a position in `ties` is as good as the position after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Filled
    completions: Annotated[tuple[Filled, ...], Field(min_length=2)]
    group: Filled
    ties: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        last = len(self.completions) - 2
        if any(not 0 <= position <= last for position in self.ties):
            raise ValueError(f"ties must be positions from 0 to {last}, found {list(self.ties)}")
        if len(set(self.ties)) != len(self.ties):
            raise ValueError(f"ties name a position twice: {list(self.ties)}")
        levels = self.levels
        ranks: dict[str, int] = {}
        for completion, level in zip(self.completions, levels, strict=True):
            if ranks.setdefault(completion, level) != level:
                raise ValueError("the same completion stands at two ranks that are not tied")
        return self

    @property
    def levels(self) -> tuple[int, ...]:
        """The rank of each completion, 0 the best; tied completions share one."""
        levels = [0]
        for position in range(len(self.completions) - 1):
            levels.append(levels[-1] + (position not in self.ties))
        return tuple(levels)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (better, worse) pair of positions; tied completions make none."""
        levels = self.levels
        positions = range(len(levels))
        return tuple((i, j) for i in positions for j in positions if levels[i] < levels[j])


class Comparisons(BaseModel):
    """Completions of one prompt, and which of two was preferred.

    `kinds` say what each completion is ("answer", "reference", "toxic", "chosen", ...). `pairs` are positions,
    (preferred, other) as labelled; `flipped` tells which labels are known to be wrong. `group` names what must
    never be divided between splits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Filled
    prompt: Filled
    completions: Annotated[tuple[Filled, ...], Field(min_length=2)]
    kinds: tuple[Filled, ...]
    pairs: Annotated[tuple[tuple[int, int], ...], Field(min_length=1)]
    flipped: tuple[bool, ...]
    reference: str | None
    group: Filled

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count = len(self.completions)
        if len(set(self.completions)) != count:
            raise ValueError("the same completion stands there twice")
        if len(self.kinds) != count:
            raise ValueError(f"{len(self.kinds)} kinds for {count} completions")
        if len(self.flipped) != len(self.pairs):
            raise ValueError(f"{len(self.flipped)} values of flipped for {len(self.pairs)} pairs")
        for pair in self.pairs:
            if pair[0] == pair[1] or not all(0 <= position < count for position in pair):
                raise ValueError(f"pair {list(pair)} is not two positions from 0 to {count - 1}")
        if len(set(map(frozenset, self.pairs))) != len(self.pairs):
            raise ValueError("the same two completions are compared twice")
        return self

    def line(self) -> str:
        """The comparisons as one JSON line, without the line end; equal ones give equal bytes."""
        return _ENCODER.encode(dict(self))


AnyRecord = TypeVar("AnyRecord", Example, Comparisons)


def iterate_examples(path: Path) -> Iterator[Example]:
    """The examples of a JSON lines file that `prepare` wrote, in file order.

    Raises DataError when the file is missing or a line is not an example, naming file, line and field.
    """
    return _iterate(path, Example, "prepare")


def read_examples(path: Path, tasks: Collection[str] | None = None) -> list[Example]:
    """The examples of `path`, of the given tasks or of all, in file order. Raises as `iterate_examples`."""
    return [example for example in iterate_examples(path) if tasks is None or example.task in tasks]


def read_comparisons(path: Path) -> list[Comparisons]:
    """The comparisons of a file that `feedback` wrote, in file order. Raises as `iterate_examples`."""
    return list(_iterate(path, Comparisons, "feedback"))


def _iterate(path: Path, record: type[AnyRecord], stage: str) -> Iterator[AnyRecord]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield record.model_validate_json(line)
                except ValidationError as error:
                    first = error.errors(include_url=False, include_input=False)[0]
                    field = ".".join(map(str, first["loc"])) or "line"
                    raise DataError(
                        f"{path} line {number}: {field}: {first['msg']}; run {stage} again"
                    ) from None
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run {stage} first") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); run {stage} again") from None
