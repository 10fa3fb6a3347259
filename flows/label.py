"""People rank answers: make the sheet of prompts and answers, serve the page, report how far labelers agree."""

import getpass
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from flows import label_page, pages, rankings
from tasks.labels import agreement, journal, sheet
from tasks.labels.desk import Desk
from tasks.labels.sheet import MOST_ANSWERS, Recipe, Sheet
from tasks.stage.errors import DataError, TryAgain, UserError, say, told
from tasks.stage.lock import Lock, holder
from tasks.stage.params import PARAMS_FILE, check_all, read_shared, read_yaml
from tasks.stage.progress import progress

EVALUATE = "evaluate"
PROMPTS, TEMPERATURE = 50, 1.0
SAMPLES_OF_ONE = 4


@dataclass(frozen=True)
class Wishes:
    """What the sheet shall be made of; None leaves it to the sheet that is there, or to what is usual."""

    variants: Sequence[str] | None = None
    samples: int | None = None
    temperature: float | None = None
    task: str | None = None
    split: Literal["train", "validation"] | None = None
    prompts: int | None = None


def label(root: Path, wishes: Wishes, new: bool, overlap: float, labeler: str, host: str, port: int) -> None:
    """Serve the page until KeyboardInterrupt.

    Raises UserError for wishes that cannot be met, a port in use, or a host of others without a password;
    TryAgain when the page is served already.
    """
    if not pages.is_loopback(host) and pages.PASSWORD not in os.environ and sys.stdin.isatty():
        os.environ[pages.PASSWORD] = getpass.getpass("Password for labelers: ")
    lock = Lock(root / ".work" / "label.lock")
    if not lock.acquire():
        where = rankings.page(root) or "it is starting"
        raise TryAgain(f"the page is served already by process {holder(lock.path)}: {where}")
    try:
        pages.check_host(host, port)
        if labeler:
            journal.path_of(root / rankings.ANSWERS, labeler)
        found = _sheet(root, wishes, new, read_shared(read_yaml(PARAMS_FILE)).seed)
        for path in sorted((root / rankings.ANSWERS).glob("*.jsonl")):
            if cut := journal.mend(path):
                say(f"{path.relative_to(root)}: the last line was cut short (a crash?): {cut} bytes removed")
        desk = Desk(
            found.items,
            root / rankings.ANSWERS,
            found.recipe.seed,
            overlap,
            saved=lambda: _collect(root),
        )
        _serve(root, desk, labeler, host, port)
    finally:
        lock.release()


def _serve(root: Path, desk: Desk, labeler: str, host: str, port: int) -> None:
    note = rankings.note_path(root)
    _collect(root)
    page = label_page.build(desk, labeler)
    note.write_text(f"http://{f'[{host}]' if ':' in host else host}:{port}", encoding="utf-8")
    try:
        pages.launch(page, host, port, label_page.LAYOUT)
    finally:
        note.unlink(missing_ok=True)
    collected = _collect(root)
    count = journal.count(root / rankings.ANSWERS)
    rows = f"{count} ranking{'s' * (count != 1)}"
    if collected and count:
        say(f"{rows} in {rankings.RANKINGS}; train on them: lifecycle run --preset labelled")
    elif count:
        say(f"{rows} in {rankings.ANSWERS}; a run has the workspace: they are collected later")


def _collect(root: Path) -> bool:
    """Collect what is saved in the journals; that this fails, on a full disk say, loses nothing."""
    try:
        return rankings.collect_unless_running(root)
    except OSError as error:
        say(f"warning: {rankings.RANKINGS} was not brought up to date: {told(error)}")
        return False


def report(root: Path) -> dict[str, Any]:
    """Counts of each labeler, and how far they agree."""
    return agreement.report(journal.read_all(root / rankings.ANSWERS))


def show(found: Mapping[str, Any]) -> None:
    """Print a report as tables."""
    console = Console(highlight=False)
    if not found["labelers"]:
        console.print("nobody has ranked anything yet: lifecycle label")
        return
    labelers = Table("labeler", box=None, header_style="bold")
    for column in ("ranked", "all bad", "skipped", "pairs"):
        labelers.add_column(column, justify="right")
    for name, counts in found["labelers"].items():
        labelers.add_row(name, *(str(counts[column]) for column in ("ranked", "all_bad", "skipped", "pairs")))
    console.print(labelers)
    console.print()
    between = Table("labelers", box=None, header_style="bold")
    for column in ("pairs of answers", "the same", "Krippendorff's alpha"):
        between.add_column(column, justify="right")
    for names, figures in [
        ("all", found["all"]),
        *((", ".join(each["labelers"]), each) for each in found["between"]),
    ]:
        between.add_row(names, str(figures["pairs"]), _figure(figures["same"]), _figure(figures["alpha"]))
    console.print(between)
    console.print(f"\n{found['items_of_several']} of {found['items']} prompts were judged by several labelers.")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _sheet(root: Path, wishes: Wishes, new: bool, seed: int) -> Sheet:
    """The sheet that is there, or one that is made now."""
    path = root / rankings.SHEET
    if path.exists() and not new:
        found = sheet.read(path)
        for name, wish in asdict(wishes).items():
            there = found.recipe.model_dump()[name]
            if wish is not None and (tuple(wish) if isinstance(wish, list) else wish) != there:
                raise UserError(
                    f"{rankings.SHEET} was made with {name} {there}: "
                    "--new makes another, and keeps what was ranked"
                )
        return found
    check_all()
    data = read_yaml(PARAMS_FILE)
    recipe = _recipe(data[EVALUATE], wishes, seed)
    settings = data[EVALUATE]
    answers = recipe.prompts * recipe.samples * len(recipe.variants)
    with progress(answers, "answers to rank") as bar:
        made = sheet.make(
            recipe,
            Path("data") / "examples",
            {name: _folder(settings["variants"][name]) for name in recipe.variants},
            settings["generation"],
            batch_size=settings["batch_size"],
            max_prompt_tokens=settings["max_prompt_tokens"],
            compute=read_shared(data).compute,
            progress=bar.advance,
        )
    sheet.write(path, made)
    say(f"{len(made.items)} prompts with answers that differ, from {', '.join(recipe.variants)}")
    return made


def _recipe(settings: Mapping[str, Any], wishes: Wishes, seed: int) -> Recipe:
    known = {name: found for name, found in settings["variants"].items() if found["shots"] == 0}
    here = [name for name, found in known.items() if _folder(found).is_dir()]
    variants = tuple(dict.fromkeys(wishes.variants or here))
    for name in variants:
        if name not in known:
            raise UserError(
                f"--variant {name}: expected one of evaluate.variants without shots ({', '.join(known)})"
            )
        if name not in here:
            raise DataError(f"{_folder(known[name])} is missing: run the stage that makes it, or name another")
    if not variants:
        raise DataError("there is no model yet to give answers: lifecycle run --stage finetune")
    samples = wishes.samples or (SAMPLES_OF_ONE if len(variants) == 1 else 1)
    if not 2 <= samples * len(variants) <= MOST_ANSWERS:
        raise UserError(
            f"{len(variants)} variants with {samples} answers each: expected 2 to {MOST_ANSWERS} answers; "
            "choose with --variant and --samples"
        )
    return Recipe(
        variants=variants,
        samples=samples,
        temperature=TEMPERATURE if wishes.temperature is None else wishes.temperature,
        task=wishes.task or settings["task"],
        split=wishes.split or "train",
        prompts=wishes.prompts or PROMPTS,
        seed=seed,
    )


def _folder(variant: Mapping[str, Any]) -> Path:
    return Path("models") / str(variant["model"])
