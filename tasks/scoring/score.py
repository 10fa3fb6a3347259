"""A file of prompts becomes a file of answers and scores: in order, in parts, here or on a Ray cluster."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from tasks.evaluate import Params, check_generation
from tasks.scoring.models import Job, Models
from tasks.scoring.prompts import Part, checked, parts
from tasks.scoring.unfinished import unfinished
from tasks.stage.errors import UserError, say
from tasks.stage.params import PARAMS_FILE, read_section, read_shared, read_yaml
from tasks.stage.progress import progress


def job(root: Path, wanted: str, settings: Mapping[str, Any], seed: int | None) -> Job:
    """The job of a variant of the evaluation, or of a model's folder, in a repository.

    `settings` replace fields of evaluate.generation. Answers get a reward where there is a reward model. Raises
    UserError for a model that is not there and settings that cannot be.
    """
    data = read_yaml(root / PARAMS_FILE)
    params, shared = read_section(data, "evaluate", Params), read_shared(data)
    named = params.alignment.reward if params.alignment is not None else None
    reward = root / "models" / (named or "reward")
    generation = {**params.generation, **settings}
    check_generation("generation", generation)
    return Job(
        model=_model(root, wanted, params),
        reward=reward if reward.is_dir() else None,
        toxicity=params.toxicity,
        generation=generation,
        batch_size=params.batch_size,
        max_prompt_tokens=params.max_prompt_tokens,
        seed=shared.seed if seed is None else seed,
        compute=shared.compute,
    )


def score(asked: Job, source: Path, output: Path, part_rows: int, address: str | None) -> int:
    """Write the rows of `source` with answers and scores to `output`, all or nothing; return how many they are.

    Goes on where the same job stopped. Each `part_rows` rows are answered together, so a sampled answer depends
    on how many they are; `address` is the Ray cluster that does it, None this process. Raises DataError for
    the first bad row, before any model is opened, TryAgain when the cluster fails.
    """
    prompts = checked(source)
    fingerprint = f"{asked.fingerprint()} of {part_rows} rows of {prompts.digest}"
    with unfinished(output, fingerprint) as results:
        if results.rows:
            say(f"going on behind row {results.rows:,} of {prompts.rows:,}")
        todo = parts(prompts, part_rows, results.rows)
        with (
            progress(prompts.rows - results.rows, "answering prompts") as bar,
            closing(_answered(asked, fingerprint, todo, address, bar.advance)) as answered,
        ):
            for rows, lines in answered:
                results.add(lines, rows)
        results.finish()
    return prompts.rows


def _answered(
    asked: Job, fingerprint: str, todo: Iterator[Part], address: str | None, advance: Callable[[int], object]
) -> Generator[tuple[int, bytes]]:
    if address is None:
        models: Models | None = None
        for part in todo:
            models = models or Models(asked)
            yield len(part.rows), models.lines(part, advance)
        return
    from tasks.scoring.remote import answered

    for rows, lines in answered(asked, fingerprint, todo, address):
        yield rows, lines
        advance(rows)


def _model(root: Path, wanted: str, params: Params) -> Path:
    variant = params.variants.get(wanted)
    if variant is not None:
        if variant.shots:
            raise UserError(
                f"{wanted} begins prompts with worked examples: score {variant.model} with them in the prompts"
            )
        folder = root / "models" / variant.model
    else:
        folder = Path(wanted)
    if not folder.is_dir():
        known = ", ".join(name for name, variant in params.variants.items() if not variant.shots)
        raise UserError(f"{wanted} is neither a folder nor a variant whose model is there; variants: {known}")
    return folder
