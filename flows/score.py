"""A file of prompts becomes a file of answers and scores: `lifecycle score`."""

from collections.abc import Sequence
from pathlib import Path

from flows.params_file import parse
from tasks.scoring import score as batch
from tasks.stage.errors import UserError


def score(
    root: Path,
    wanted: str,
    settings: Sequence[str],
    seed: int | None,
    source: Path,
    output: Path,
    part_rows: int,
    address: str | None,
) -> int:
    """Answer the prompts of `source` with `wanted`; return how many rows `output` has.

    Raises UserError for what was asked wrongly, DataError for a bad row, TryAgain when it may work later.
    """
    if output == source:
        raise UserError(f"--output is the file of --input, {source}: choose another")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file in it")
    fields = dict(_field(setting) for setting in settings)
    return batch.score(batch.job(root, wanted, fields, seed), source, output, part_rows, address)


def _field(setting: str) -> tuple[str, object]:
    keys, value = parse(setting)
    return ".".join(keys), value
