"""What is put before labelers: prompts, each with a few different answers whose makers they are not told.

The answers are made in advance, so that nobody waits for a model.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from tasks.data.keys import key
from tasks.data.records import Example, Filled, read_examples
from tasks.stage import Compute, DataError
from tasks.stage.errors import one_line
from tasks.stage.files import write_json

MOST_ANSWERS = 9  # one for each key from 1 to 9
Temperature = Annotated[float, Field(ge=0)]


class Answer(BaseModel):
    """A text, and the variants that gave it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Filled
    variants: tuple[str, ...]


class Item(BaseModel):
    """A prompt with different answers. `group` names what must never be divided between splits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Filled
    group: Filled
    answers: Annotated[tuple[Answer, ...], Field(min_length=2, max_length=MOST_ANSWERS)]

    @property
    def id(self) -> str:
        """A hash of the prompt and its answers, 16 letters."""
        return f"{key(self.prompt, *(answer.text for answer in self.answers)):016x}"


class Recipe(BaseModel):
    """How a sheet was made: `prompts` of a `task` in a `split`, `samples` answers of each of the `variants`.

    Answers are sampled at `temperature`; at 0 they are those of the evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variants: Annotated[tuple[str, ...], Field(min_length=1)]
    samples: PositiveInt
    temperature: Temperature
    task: str
    split: Literal["train", "validation"]
    prompts: PositiveInt
    seed: int


class Sheet(BaseModel):
    """Items, and how they were made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    items: Annotated[tuple[Item, ...], Field(min_length=1)]


def read(path: Path) -> Sheet:
    """The sheet in a file. Raises DataError when it is none."""
    try:
        return Sheet.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no sheet ({one_line(error)[:120]}): make it again with --new") from None


def write(path: Path, sheet: Sheet) -> None:
    """Put `sheet` in the place of what is at `path`."""
    write_json(path, sheet.model_dump(mode="json"))


def make(
    recipe: Recipe,
    examples: Path,
    models: Mapping[str, Path],
    generation: Mapping[str, Any],
    *,
    batch_size: int,
    max_prompt_tokens: int,
    compute: Compute,
    progress: Callable[[int], object],
) -> Sheet:
    """Let each variant answer, one model in memory at a time; `models` are their folders.

    `generation` holds the settings of the evaluation. `progress` is told how many answers each batch gave.
    Raises DataError when there are no prompts of the task, or no two answers to any of them differ.
    """
    from tasks.lm.model import load
    from tasks.lm.peft import merged_to_answer
    from tasks.lm.respond import respond

    asked = _drawn(recipe, examples)
    prompts = [example.prompt for example in asked for _ in range(recipe.samples)]
    settings = dict(generation)
    if recipe.temperature:
        settings |= {"do_sample": True, "num_beams": 1, "top_k": 0, "temperature": recipe.temperature}
    answers = {
        name: respond(
            merged_to_answer(load(models[name], compute)),
            prompts,
            settings,
            batch_size=batch_size,
            seed=recipe.seed + number,
            max_prompt_tokens=max_prompt_tokens,
            progress=progress,
        )
        for number, name in enumerate(recipe.variants)
    }
    rows = [slice(start, start + recipe.samples) for start in range(0, len(prompts), recipe.samples)]
    made = [
        item(example, {name: texts[row] for name, texts in answers.items()})
        for example, row in zip(asked, rows, strict=True)
    ]
    if not any(made):
        raise DataError(
            "all answers to each prompt are the same, so there is nothing to rank: "
            "name other variants, or take more --samples at a higher --temperature"
        )
    return Sheet(recipe=recipe, items=tuple(filter(None, made)))


def item(example: Example, answers: Mapping[str, Sequence[str]]) -> Item | None:
    """The different answers to an example, by variant; None when fewer than two are different and not blank."""
    makers: dict[str, list[str]] = {}
    for name, texts in answers.items():
        for text in filter(None, dict.fromkeys(text.strip() for text in texts)):
            makers.setdefault(text, []).append(name)
    if len(makers) < 2:
        return None
    found = tuple(Answer(text=text, variants=tuple(names)) for text, names in makers.items())
    return Item(prompt=example.prompt.strip(), group=example.group, answers=found)


def _drawn(recipe: Recipe, examples: Path) -> list[Example]:
    path = examples / f"{recipe.split}.jsonl"
    known = read_examples(path, [recipe.task])
    if not known:
        raise DataError(f"{path} has no example of the task {recipe.task}: name another with --task")
    return random.Random(recipe.seed).sample(known, min(recipe.prompts, len(known)))
