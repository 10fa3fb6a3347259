"""What labelers said, saved the moment they say it: a file for each, to which whole lines are added.

A line stands for itself: the prompt, the answers best first, and who ranked them. So what was said stays good
when other prompts are put before the labelers. What is taken back is a further line.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, ValidationError

from tasks.data.records import Ranking
from tasks.labels.sheet import Item
from tasks.stage import DataError, UserError
from tasks.stage.files import sync_folder, write_text

Verdict = Literal["ranked", "all bad", "skipped", "undone"]
NAME = re.compile(r"\w[\w.-]{0,39}")


class Judgement(Ranking):
    """A labeler's answer to one item: a ranking, and how it came about.

    Where the `verdict` is not "ranked", all completions are tied: none is preferred. `variants` made the
    completion at their place. `at` is the time in UTC (ISO 8601), `seconds` how long the item was looked at.
    """

    item: str
    labeler: str
    verdict: Verdict
    variants: tuple[tuple[str, ...], ...]
    at: str
    seconds: NonNegativeFloat

    def line(self) -> str:
        """The judgement as one JSON line, without the line end."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, sort_keys=True)


def judged(
    item: Item,
    labeler: str,
    verdict: Verdict,
    ranks: Sequence[int],
    places: Sequence[int],
    at: str,
    seconds: float,
) -> Judgement:
    """The judgement of `item` whose answer `places[k]` has the rank `ranks[k]`, 1 the best, equal ones tied.

    Of another verdict than "ranked" the ranks do not count. Raises UserError when they do not fit.
    """
    if verdict != "ranked":
        ranks = [1] * len(places)
    if len(ranks) != len(places) or any(not isinstance(rank, int) or rank < 1 for rank in ranks):
        raise UserError(f"{len(places)} answers need as many ranks from 1 up, found {list(ranks)}")
    order = sorted(zip(ranks, places, strict=True))
    answers = [item.answers[place] for _, place in order]
    return Judgement(
        prompt=item.prompt,
        completions=tuple(answer.text for answer in answers),
        group=item.group,
        ties=tuple(at for at, (one, other) in enumerate(pairwise(order)) if one[0] == other[0]),
        item=item.id,
        labeler=labeler,
        verdict=verdict,
        variants=tuple(answer.variants for answer in answers),
        at=at,
        seconds=seconds,
    )


def path_of(folder: Path, labeler: str) -> Path:
    """The journal of a labeler. Raises UserError for a name that makes no file name."""
    if NAME.fullmatch(labeler) is None:
        raise UserError(
            f"labeler {labeler!r}: expected up to 40 letters, digits, '.', '_' and '-', the first no sign"
        )
    return folder / f"{labeler}.jsonl"


def append(path: Path, judgement: Judgement) -> None:
    """Add a line; it is on the disk when this returns. When it cannot be, the file is left as it was."""
    line = judgement.line().encode() + b"\n"
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)
    if new:
        sync_folder(path.parent)


def mend(path: Path) -> int:
    """Cut off a last line that a crash left without its end; how many bytes that were."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())
    return len(content) - whole


def read(path: Path) -> dict[str, Judgement]:
    """What holds now of a labeler's journal, by item, in the order given; a torn last line is left out.

    Raises DataError, naming the line, when another line is no judgement.
    """
    held: dict[str, Judgement] = {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            judgement = Judgement.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"])) or "line"
            raise DataError(f"{path} line {number}: {field}: {first['msg']}; mend or remove the line") from None
        held.pop(judgement.item, None)
        if judgement.verdict != "undone":
            held[judgement.item] = judgement
    return held


def read_all(folder: Path) -> dict[str, dict[str, Judgement]]:
    """What holds now of every journal in `folder`, by labeler. Raises as `read`."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.jsonl"))}


def collect(folder: Path, target: Path) -> int:
    """Write all rankings that prefer something to `target`, for `feedback` to read; how many there are.

    A file that holds the same already is not touched.
    """
    rows = _rows(read_all(folder))
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    if text and (not target.exists() or target.read_text(encoding="utf-8") != text):
        write_text(target, text)
    return len(rows)


def count(folder: Path) -> int:
    """How many rankings `collect` would write."""
    return len(_rows(read_all(folder)))


def _rows(journals: Mapping[str, Mapping[str, Judgement]]) -> list[dict[str, object]]:
    columns = ("prompt", "completions", "ties", "group", "labeler", "item")
    return [
        {column: dict(judgement)[column] for column in columns}
        for held in journals.values()
        for judgement in held.values()
        if judgement.pairs
    ]
