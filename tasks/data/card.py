"""The data card: what is in the data, as one page for people and one picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.data.records import SPLITS
from tasks.stage.files import new_folder, write_text

LONGEST_SHOWN = 700  # characters
BINS = 40

Counts = NDArray[np.integer]


class FileFigures(NamedTuple):
    """A file that was read: its good rows, its SHA-256 (None: a data set on the hub, or made here)."""

    name: str
    rows: int
    digest: str | None


@dataclass(frozen=True)
class SourceFigures:
    """What became of the rows of one source."""

    name: str
    read: int
    rejected: int
    repeats: int
    near: int
    left_out: int
    kept: int
    files: Sequence[FileFigures]


@dataclass(frozen=True)
class Card:
    """What the page says.

    `counts`: task -> rows in each of SPLITS; `text_counts`: documents in train and validation. `input_words`,
    `output_words` (by task) and `text_words` hold the length of each row. `near` are lines about near repeats
    that were removed, `shown` a few records of each task.
    """

    sources: Sequence[SourceFigures]
    text_sources: Sequence[SourceFigures]
    counts: Mapping[str, Sequence[int]]
    text_counts: Sequence[int]
    input_words: Mapping[str, Counts]
    output_words: Mapping[str, Counts]
    text_words: Counts
    near: Sequence[str]
    shown: Mapping[str, Sequence[Mapping[str, Any]]]

    def write(self, page: Path, plots: Path) -> None:
        """Write the page, and the picture `lengths.png` into the folder `plots` beside it."""
        with new_folder(plots) as folder:
            self._plot(folder / "lengths.png")
        write_text(page, self.markdown(f"{plots.name}/lengths.png"))

    def markdown(self, picture: str) -> str:
        """The page; `picture` is where it finds the plot."""
        parts = [
            "# Data card",
            "Written by the stage `prepare` from what it read and what it wrote.",
            "## Examples",
            _table(
                ["task", *SPLITS, "all"],
                [
                    *([task, *counts, sum(counts)] for task, counts in self.counts.items()),
                    ["all", *self._totals(), sum(self._totals())],
                ],
            ),
            "## Raw text",
            _table(["train", "validation"], [self.text_counts]),
            "## Sources",
            _source_table([*self.sources, *self.text_sources]),
            "A repeat asks the same about the same text (case and white space apart); a near repeat, about a "
            "text whose word 5-shingles have at least the given Jaccard index. The first one stays. Rows are "
            "left out by the weights of a mixture (train only), raw text in the group of a held-out example.",
            _list(self.near),
            _file_table([*self.sources, *self.text_sources]),
            "## Lengths",
            f"![words of inputs, answers and raw text]({picture})",
            _table(
                ["words", "median", "95 %", "longest"],
                [
                    *(_quantiles(f"{task}: input", words) for task, words in self.input_words.items()),
                    *(_quantiles(f"{task}: answer", words) for task, words in self.output_words.items()),
                    *([_quantiles("raw text", self.text_words)] if len(self.text_words) else []),
                ],
            ),
            "## Some of it",
            *(
                part
                for task, records in self.shown.items()
                for record in records
                for part in (f"**{_inline(task)}**, `{_inline(record['id'])}`", _block(_spoken(record)))
            ),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def metrics(self) -> dict[str, int]:
        """The figures of metrics/prepare.json."""
        figures = dict(zip((f"examples_{split}" for split in SPLITS), self._totals(), strict=True))
        for task, counts in self.counts.items():
            figures |= {f"{task}_{split}": count for split, count in zip(SPLITS, counts, strict=True)}
        figures |= {"text_train": self.text_counts[0], "text_validation": self.text_counts[1]}
        for prefix, sources in (("examples", self.sources), ("text", self.text_sources)):
            for name in ("read", "rejected", "repeats", "near", "left_out"):
                figures[f"{prefix}_{name}"] = sum(getattr(source, name) for source in sources)
        return figures

    def _totals(self) -> list[int]:
        return [sum(counts[split] for counts in self.counts.values()) for split in range(len(SPLITS))]

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        panels = {"input": self.input_words, "answer": self.output_words}
        if len(self.text_words):
            panels["raw text"] = {"": self.text_words}
        figure = Figure(figsize=(4 * len(panels), 3), dpi=100, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, series) in zip(axes, panels.items(), strict=True):
            longest = max(int(words.max()) for words in series.values())
            width = longest // BINS + 1
            bins = np.arange(0, longest + width + 1, width)
            for task, words in series.items():
                axis.hist(words, bins=bins, histtype="step", label=task)
            axis.set(title=title, xlabel="words", ylabel="rows")
            if any(series):
                axis.legend(fontsize="small")
        figure.savefig(path, metadata={"Software": None})


def _source_table(sources: Sequence[SourceFigures]) -> str:
    head = ["source", "read", "bad", "repeats", "near repeats", "left out", "kept"]
    rows = [[s.name, s.read, s.rejected, s.repeats, s.near, s.left_out, s.kept] for s in sources]
    return _table(head, rows)


def _file_table(sources: Sequence[SourceFigures]) -> str:
    files = [file for source in sources for file in source.files if file.digest is not None]
    rows = [[file.name, file.rows, f"`{file.digest}`"] for file in files]
    return _table(["file", "good rows", "SHA-256"], rows) if rows else ""


def _quantiles(name: str, words: Counts) -> list[object]:
    return [name, *(int(np.quantile(words, share, method="lower")) for share in (0.5, 0.95, 1.0))]


def _table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    cells = [[_inline(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *cells))


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_inline(line)}" for line in lines)


def _inline(text: str) -> str:
    """`text` on one line, in which nothing ends a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _spoken(record: Mapping[str, Any]) -> str:
    prompt = record["instruction"].replace("{input}", record["input"])
    if "{input}" not in record["instruction"]:
        prompt = f"{prompt}\n\n{record['input']}"
    answers = "\n".join(f"→ {output}" for output in record["outputs"])
    return f"{prompt[:LONGEST_SHOWN]}\n\n{answers[:LONGEST_SHOWN]}"


def _block(text: str) -> str:
    """`text` as an indented block: whatever stands in it, it cannot end the block."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
