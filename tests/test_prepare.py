"""`prepare` on small files: what comes out, every kind of bad data, and that processes change nothing."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.data import corpus, sources
from tasks.data.mapping import RankingColumns, ranking
from tasks.data.records import SPLITS, Example, Ranking, read_examples
from tasks.data.sources import Fault, Files
from tasks.prepare import Params, prepare
from tasks.stage import Compute, Context, DataError, NullTrack, ParamsError
from tasks.stage.params import validate

Row = dict[str, Any]
WORDS = ("red", "green", "blue", "cold", "warm", "late", "soon", "east", "west", "door", "wall", "lamp")


def rows(count: int, offset: int = 0) -> list[Row]:
    """Rows that no two resemble each other."""
    return [
        {
            "name": f"r{number}",
            "talk": " ".join(f"{word}{number}" for word in WORDS),
            "gist": f"gist {number}",
            "by": f"author {number % 40}",
        }
        for number in range(offset, offset + count)
    ]


def jsonl(path: Path, some: list[Row]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def source(path: Path | str, **changes: Any) -> Row:
    return {
        "kind": "file",
        "name": "talks",
        "paths": [str(path)],
        "format": "jsonl",
        "task": "summarize",
        "columns": {"input": "talk"},
        "outputs": ["gist"],
        "split": None,
        "weight": None,
        **changes,
    }


def section(*examples: Row, **changes: Any) -> Row:
    return {
        "examples": list(examples),
        "templates": {"summarize": ["Sum up:\n{input}"]},
        "on_error": "fail",
        "max_rejected_share": 0.1,
        "max_field_chars": 1000,
        "deduplicate": {"exact": True, "near": 0.8},
        "splits": {"validation": 0.1, "test": 0.1},
        "leakage": 0.8,
        "text": {"sources": [], "validation": 0.1, "deduplicate": {"exact": True, "near": None}},
        "ray": None,
        **changes,
    }


def text_source(path: Path, **changes: Any) -> Row:
    return {
        "kind": "file",
        "name": "notes",
        "paths": [str(path)],
        "format": "txt",
        "columns": {"text": "line"},
        **changes,
    }


class Recorded(NullTrack):
    def __init__(self) -> None:
        self.datasets: list[tuple[str, Path, str, int]] = []

    def dataset(self, name: str, path: Path, digest: str, rows: int) -> None:
        self.datasets.append((name, path, digest, rows))


@dataclass
class Run:
    """One run of the stage's function in a folder of its own."""

    folder: Path
    metrics: dict[str, int] = field(default_factory=dict)
    track: Recorded = field(default_factory=Recorded)

    def start(self, values: Mapping[str, Any], threads: int = 1, seed: int = 0) -> "Run":
        params = validate(dict(values), "prepare", Params)
        compute = Compute(device="cpu", precision="fp32", threads=threads, processes=1, accelerate=None)
        work = self.folder / "work"
        work.mkdir(parents=True, exist_ok=True)
        context = Context(name="prepare", seed=seed, compute=compute, work=work, track=self.track)
        out = self.folder / "out"
        self.metrics = prepare(
            params,
            out / "examples",
            out / "text",
            out / "rejects.jsonl",
            out / "data.md",
            out / "data",
            context,
        )
        return self

    def examples(self, split: str) -> list[Example]:
        return read_examples(self.folder / "out" / "examples" / f"{split}.jsonl")

    def all(self) -> list[Example]:
        return [example for split in SPLITS for example in self.examples(split)]

    def texts(self, split: str) -> list[str]:
        lines = (self.folder / "out" / "text" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    def card(self) -> str:
        return (self.folder / "out" / "data.md").read_text(encoding="utf-8")

    def rejects(self) -> list[Row]:
        lines = (self.folder / "out" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def outputs(self) -> dict[str, bytes]:
        out = self.folder / "out"
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


# --- what comes out


def test_rows_become_examples_in_three_splits(tmp_path: Path, run: Run) -> None:
    path = jsonl(tmp_path / "talks.jsonl", rows(300))
    run.start(section(source(path)))
    made = run.all()
    assert len(made) == 300 == run.metrics["examples_read"]
    assert {split: len(run.examples(split)) for split in SPLITS} == {
        split: run.metrics[f"examples_{split}"] for split in SPLITS
    }
    assert run.metrics["summarize_test"] == run.metrics["examples_test"] > 10
    first = next(example for example in made if example.outputs == ("gist 0",))
    assert first.id == "talks:1.1"
    assert first.prompt == f"Sum up:\n{rows(1)[0]['talk']}"
    assert first.task == "summarize" and first.split is None and first.slots == {}
    [(name, tracked, digest, count)] = run.track.datasets
    assert (name, tracked, count) == ("talks", path, 300)
    assert digest in run.card() and "| summarize |" in run.card()
    assert (run.folder / "out/data/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert run.texts("train") == run.texts("validation") == run.rejects() == []
    assert not list((run.folder / "work").iterdir())  # nothing is left behind


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    some = [*rows(40), {"name": 'ü,"x"', "talk": "line one\nline two é", "gist": 'a "b"', "by": "b"}]
    jsonl(tmp_path / "a.jsonl", some)
    jsonl(tmp_path / "a.jsonl.gz", some)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes() + b"\n \n")
    (tmp_path / "a.json").write_text(json.dumps({"about": "x", "rows": some}), encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(some), encoding="utf-8")
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, some[0])
        writer.writeheader()
        writer.writerows(some)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / "a.parquet")
    results = []
    for name in ("a.jsonl", "a.jsonl.gz", "bom.jsonl", "a.json", "list.json", "a.csv", "a.parquet"):
        form = name.removesuffix(".gz").rpartition(".")[2]
        columns = {"id": "name", "input": "talk", "group": "by"}
        run = Run(tmp_path / f"run-{name}").start(
            section(source(tmp_path / name, format=form, columns=columns))
        )
        results.append([example.line() for example in run.all()])
    assert len(results[0]) == 41
    assert all(result == results[0] for result in results)


def test_fields_are_columns_or_text_with_columns_in_it(tmp_path: Path, run: Run) -> None:
    path = jsonl(
        tmp_path / "x.jsonl", [{"q": "why", "n": 4, "one": "a", "more": ["b", "c"], "how": "Say {{it}}"}]
    )
    mapped = source(
        path, columns={"instruction": "{how}: {q}?", "input": "n", "group": "{q}/{n}"}, outputs=["one", "more"]
    )
    [made] = run.start(section(mapped, templates={}, splits={"validation": 0, "test": 0})).all()
    assert (made.instruction, made.input, made.group) == ("Say {{it}}: why?", "4", "why/4")
    assert made.outputs == ("a", "b", "c")


def test_each_example_gets_one_of_the_templates_by_its_input(tmp_path: Path) -> None:
    templates = {"summarize": ["{input} tl;dr", "Sum up", "Say it shortly: {input}"]}
    path = jsonl(tmp_path / "a.jsonl", rows(90))
    first = Run(tmp_path / "one").start(section(source(path), templates=templates)).all()
    used = [example.instruction for example in first]
    assert all(used.count(template) > 10 for template in templates["summarize"])
    more = jsonl(tmp_path / "b.jsonl", rows(5, offset=1000) + rows(90))
    second = Run(tmp_path / "two").start(section(source(more), templates=templates)).all()
    put = {example.input: example.instruction for example in second}
    assert all(put[example.input] == example.instruction for example in first)


def test_adding_rows_moves_no_old_row(tmp_path: Path) -> None:
    def places(name: str, some: list[Row]) -> dict[str, str]:
        run = Run(tmp_path / name).start(section(source(jsonl(tmp_path / f"{name}.jsonl", some))))
        return {example.input: split for split in SPLITS for example in run.examples(split)}

    old, new = places("old", rows(200)), places("new", rows(100, offset=500) + rows(200))
    assert len(set(old.values())) == 3
    assert {text: new[text] for text in old} == old


def test_no_group_crosses_a_split_and_pins_are_kept(tmp_path: Path, run: Run) -> None:
    columns = {"id": "name", "input": "talk", "group": "by"}
    loose = source(jsonl(tmp_path / "a.jsonl", rows(200)), columns=columns)
    pinned = source(
        jsonl(tmp_path / "b.jsonl", rows(3, offset=201)), name="exam", columns=columns, split="test"
    )
    run.start(section(loose, pinned))
    groups = [{example.group for example in run.examples(split)} for split in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 40
    assert {"exam:r201", "exam:r202", "exam:r203"} <= {example.id for example in run.examples("test")}
    assert {"author 1", "author 2", "author 3"} <= groups[2]


def test_repeats_go_and_the_first_stays(tmp_path: Path, run: Run) -> None:
    some = rows(50)
    shouted = {**some[3], "talk": f"  {some[3]['talk'].upper()} ", "gist": "other"}
    long = " ".join(f"{word}x{number}" for number in range(6) for word in WORDS)
    near = [{"talk": long, "gist": "one"}, {"talk": long.replace("doorx3", "gate"), "gist": "two"}]
    run.start(section(source(jsonl(tmp_path / "a.jsonl", [*some, shouted, *near]))))
    assert (run.metrics["examples_repeats"], run.metrics["examples_near"]) == (1, 1)
    outputs = {example.reference for example in run.all()}
    assert "gist 3" in outputs and "other" not in outputs
    assert "one" in outputs and "two" not in outputs
    assert "talks:1.53 is near talks:1.52 (0.86)" in run.card()


def test_repeats_stay_when_asked_and_other_questions_are_no_repeats(tmp_path: Path, run: Run) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows(30) + rows(2))
    topic = source(path, name="topics", task="topic", outputs=["by"])
    templates = {"summarize": ["Sum up"], "topic": ["Who?"]}
    run.start(section(source(path), topic, templates=templates, deduplicate={"exact": False, "near": None}))
    assert run.metrics["examples_repeats"] == 0
    assert (run.metrics["summarize_train"], len(run.all())) == (run.metrics["topic_train"], 64)


def test_sources_are_mixed_by_weight_in_train_only(tmp_path: Path, run: Run) -> None:
    many = source(jsonl(tmp_path / "a.jsonl", rows(600)), weight=1.0)
    few = source(jsonl(tmp_path / "b.jsonl", rows(100, offset=900)), name="few", weight=2.0)
    run.start(section(many, few))
    train = [example.id.partition(":")[0] for example in run.examples("train")]
    assert train.count("few") == 100 - sum(
        ex.id.startswith("few") for s in SPLITS[1:] for ex in run.examples(s)
    )
    assert 25 <= train.count("talks") <= 60
    held_out = len(run.examples("validation")) + len(run.examples("test"))
    assert held_out + len(train) + run.metrics["examples_left_out"] == 700
    assert held_out > 90


def test_raw_text_holds_nothing_of_held_out_examples(tmp_path: Path, run: Run) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows(200))
    notes = tmp_path / "notes.txt"
    notes.write_text("one note\n\ntwo notes\none note\n", encoding="utf-8")
    talks = text_source(
        path, name="talks", format="jsonl", columns={"text": "{talk} = {gist}", "group": "talk"}
    )
    text = {
        "sources": [text_source(notes), talks],
        "validation": 0.2,
        "deduplicate": {"exact": True, "near": None},
    }
    columns = {"input": "talk", "group": "talk"}
    run.start(section(source(path, columns=columns), text=text))
    read = run.texts("train") + run.texts("validation")
    assert {"one note", "two notes"} <= set(read)
    used = {example.input for example in run.examples("train")}
    assert {line.partition(" = ")[0] for line in read} - {"one note", "two notes"} == used
    held_out = len(run.examples("validation")) + len(run.examples("test"))
    assert run.metrics["text_left_out"] == held_out > 20
    assert (run.metrics["text_repeats"], len(read)) == (
        1,
        run.metrics["text_train"] + run.metrics["text_validation"],
    )
    assert len(run.texts("validation")) > 10


def test_the_synthetic_corpus_is_a_source(run: Run) -> None:
    text = {
        "sources": [{"kind": "synthetic", "documents": 60}],
        "validation": 0.1,
        "deduplicate": {"exact": True, "near": 0.95},
    }
    synthetic = {"kind": "synthetic", "dialogues": 60, "weight": None}
    run.start(section(synthetic, templates={}, text=text, leakage=None), seed=3)
    assert {example.task for example in run.all()} == {"summarize", "act", "slot"}
    assert run.metrics["examples_read"] == 180 and run.metrics["text_read"] == 60
    assert any(example.split == "test" for example in run.examples("test"))
    assert not any(example.split == "test" for example in run.examples("train"))


def test_the_same_input_gives_the_same_bytes_in_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = rows(700) + rows(50) + [{"talk": "", "gist": "x"}]
    path = jsonl(tmp_path / "a.jsonl", some)
    values = section(source(path), on_error="skip")
    whole = Run(tmp_path / "whole").start(values)
    again = Run(tmp_path / "again").start(values)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(corpus, "CHUNKS_HERE", 3)
    split = Run(tmp_path / "split").start(values, threads=2)
    assert whole.metrics["examples_repeats"] == 50 and len(whole.rejects()) == 1
    assert whole.outputs() == again.outputs() == split.outputs()
    assert whole.metrics == split.metrics


def test_names_in_the_data_never_become_paths(tmp_path: Path, run: Run) -> None:
    evil = "../../../evil\0/x"
    some = [{**row, "name": f"{evil}{row['name']}", "by": f"/etc/{row['by']}"} for row in rows(20)]
    columns = {"id": "name", "input": "talk", "group": "by"}
    run.start(section(source(jsonl(tmp_path / "a.jsonl", some), columns=columns)))
    assert len(run.all()) == 20
    assert set(run.outputs()) == {
        *(f"examples/{split}.jsonl" for split in SPLITS),
        "text/train.jsonl",
        "text/validation.jsonl",
        "rejects.jsonl",
        "data.md",
        "data/lengths.png",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "run"}


# --- what is refused

GOOD = '{"talk": "a b", "gist": "c"}\n'


def write(data: bytes | str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data) and None


def repeated_id(path: Path) -> None:
    jsonl(path, [*rows(3), {**rows(1, offset=9)[0], "name": "r1"}])


BAD_FILES: dict[str, tuple[str, Callable[[Path], None] | None, list[str]]] = {
    "missing file": ("a.jsonl", None, ["a.jsonl: no such file"]),
    "empty file": ("a.jsonl", write(""), ["a.jsonl: empty, expected at least one row"]),
    "blank lines": ("a.jsonl", write("\n \n"), ["a.jsonl: empty"]),
    "malformed": (
        "a.jsonl",
        write(GOOD + '{"talk": "a", gist}'),
        ["line 2: found", "character 15", "expected JSON"],
    ),
    "too deep": ("a.jsonl", write("[" * 100_000), ["line 1: found", "recursion"]),
    "no object": ("a.jsonl", write(GOOD + "[1]"), ["line 2: found [1], expected a JSON object"]),
    "encoding": ("a.jsonl", write(GOOD.encode() + b'{"talk": "caf\xe9"}'), ["line 2", "byte 0xe9", "UTF-8"]),
    "half a character": (
        "a.jsonl",
        write(r'{"talk": "x \ud83d", "gist": "c"}'),
        ["column talk", r"\ud83d", "UTF-8"],
    ),
    "UTF-16": ("a.jsonl", write(GOOD.encode("utf-16")), ["a.jsonl: UTF-16, expected UTF-8", "iconv"]),
    "missing column": ("a.jsonl", write('{"talk": "a"}'), ["line 1, column gist", "the row has talk", "text"]),
    "null": ("a.jsonl", write('{"talk": "a", "gist": null}'), ["column gist: found null, expected text"]),
    "NaN": ("a.jsonl", write('{"talk": "a", "gist": NaN}'), ["column gist: found NaN, expected text"]),
    "truth value": (
        "a.jsonl",
        write('{"talk": true, "gist": "c"}'),
        ["column talk: found true, expected text"],
    ),
    "object": ("a.jsonl", write('{"talk": {"a": 1}, "gist": "c"}'), ['column talk: found {"a": 1}']),
    "empty input": ("a.jsonl", write('{"talk": " \\n", "gist": "c"}'), ["column talk: found no text"]),
    "empty output": (
        "a.jsonl",
        write('{"talk": "a", "gist": " "}'),
        ['column gist: found " ", expected text that'],
    ),
    "no outputs": ("a.jsonl", write('{"talk": "a", "gist": []}'), ["column gist: found []", "at least 1 item"]),
    "10 MB": (
        "a.jsonl",
        write(json.dumps({"talk": "x" * 10_485_760, "gist": "c"})),
        ["line 1, column talk: found 10,485,760 characters, expected at most 1,000 (prepare.max_field_chars)"],
    ),
    "repeated id": ("a.jsonl", repeated_id, ["line 4, column id: found talks:r1", "expected a new id"]),
    "cut gzip": (
        "a.jsonl.gz",
        write(gzip.compress(os.urandom(5000))[:-30]),
        ["gz: the gzip stream ends too early"],
    ),
    "no gzip": ("a.jsonl.gz", write(GOOD), ["gz: not a whole gzip file"]),
    "damaged gzip": (
        "a.jsonl.gz",
        write(gzip.compress(GOOD.encode())[:10] + b"\xff" * 40),
        ["not a whole gzip"],
    ),
    "JSON": ("a.json", write('{"rows": [\n{"talk": }]}'), ["a.json line 2, column 10: expected JSON"]),
    "JSON encoding": ("a.json", write(b'["\xff"]'), ["a.json: byte 0xff at 2 is not UTF-8"]),
    "JSON without rows": (
        "a.json",
        write('{"a": 1, "b": [], "c": []}'),
        ["expected a list of objects", "a, b, c"],
    ),
    "JSON of text": (
        "a.json",
        write('[{"talk": "a", "gist": "b"}, "x"]'),
        ['row 2: found "x", expected a JSON'],
    ),
    "CSV fields": (
        "a.csv",
        write("talk,gist\na,b\na,b,c\n"),
        ["a.csv line 3: found 3 fields, expected 2 fields"],
    ),
    "CSV quote": ("a.csv", write('talk,gist\na,b\n"a,b\nc,d\n'), ["a.csv line 3: found", "is a quote missing"]),
    "CSV column": ("a.csv", write("talk;gist\na;b\n"), ["a.csv: column 'gist' is missing; it has talk;gist"]),
    "CSV header": (
        "a.csv",
        write("talk,gist,talk\n1,2,3\n"),
        ["a.csv line 1: column 'talk' stands there twice"],
    ),
    "CSV without rows": ("a.csv", write("talk,gist\n"), ["a.csv: empty"]),
    "CSV encoding": (
        "a.csv",
        write(b"talk,gist\ncaf\xe9,b\n"),
        ["line 2, column talk: found", "expected text in UTF-8"],
    ),
    "CSV field": (
        "a.csv",
        write(f"talk,gist\n{'x' * 2000},b\n"),
        ["line 2: found field larger than field limit"],
    ),
    "no Parquet": ("a.parquet", write("talk,gist\n"), ["a.parquet: not a whole Parquet file"]),
    "folder": ("a.jsonl", Path.mkdir, ["a.jsonl: cannot be read: Is a directory"]),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_is_one_clear_line(kind: str, tmp_path: Path, run: Run) -> None:
    name, make, expected = BAD_FILES[kind]
    if make is not None:
        make(tmp_path / name)
    form = name.removesuffix(".gz").rpartition(".")[2]
    columns = {"input": "talk", "id": "name"} if kind == "repeated id" else {"input": "talk"}
    with pytest.raises(DataError) as caught:
        run.start(section(source(tmp_path / name, format=form, columns=columns)))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for part in [name, *expected]:
        assert part in message
    assert {path.name for path in run.folder.glob("out/*")} <= {"rejects.jsonl"}  # nothing half done


def test_parquet_that_was_cut_or_lacks_a_column(tmp_path: Path, run: Run) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"talk": "a"}]), path)
    with pytest.raises(DataError, match=r"a\.parquet: column 'gist' is missing; it has talk"):
        run.start(section(source(path, format="parquet")))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file"):
        run.start(section(source(path, format="parquet")))


def test_a_line_without_end_is_not_read_for_ever(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "x" * (3 << 20), encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl line 2: longer than 1 MiB"):
        run.start(section(source(path)))


def test_bad_rows_are_skipped_written_down_and_counted(tmp_path: Path, run: Run) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows(100))
    with path.open("ab") as file:
        file.write(b'{"talk": "x", "gist": ""}\nno json\n{"talk": "\xff"}\n')
    run.start(section(source(path), on_error="skip"))
    assert (run.metrics["examples_rejected"], run.metrics["examples_read"]) == (3, 103)
    found = run.rejects()
    assert [(reject["line"], reject["column"]) for reject in found] == [(101, "gist"), (102, None), (103, None)]
    assert found[0]["expected"] == "text that is not blank"
    assert all(reject["file"] == path.as_posix() and reject["found"] for reject in found)


def test_too_many_bad_rows_end_the_stage_and_the_reasons_stay(tmp_path: Path, run: Run) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*rows(17), *[{"talk": "x", "gist": ""}] * 2, {"gist": "y"}])
    with pytest.raises(DataError, match=r"source talks: 3 of 20 rows are bad \(15\.0%\), allowed are 10\.0%"):
        run.start(section(source(path), on_error="skip"))
    assert len(run.rejects()) == 3


def test_a_repeated_id_is_skipped_too(tmp_path: Path, run: Run) -> None:
    repeated_id(tmp_path / "a.jsonl")
    columns = {"id": "name", "input": "talk"}
    values = section(source(tmp_path / "a.jsonl", columns=columns), on_error="skip", max_rejected_share=0.3)
    run.start(values)
    assert [example.reference for example in run.all()].count("gist 9") == 0
    assert [reject["line"] for reject in run.rejects()] == [4]


def test_equal_texts_in_train_and_test_end_the_stage(tmp_path: Path, run: Run) -> None:
    some = [{**row, "by": str(number)} for number in range(30) for row in rows(1)]
    columns = {"id": "by", "instruction": "by", "input": "talk", "group": "by"}
    values = section(source(jsonl(tmp_path / "a.jsonl", some), columns=columns), templates={})
    with pytest.raises(
        DataError, match=r"^leak: 1 texts are in test and in train: talks:\d+ = talks:\d+; give"
    ):
        run.start(values)


def test_near_texts_in_train_and_test_end_the_stage(tmp_path: Path, run: Run) -> None:
    long = [f"{word}x{number}" for number in range(6) for word in WORDS]
    some = [
        {"talk": " ".join([*long[:number], f"new{number}", *long[number + 1 :]]), "gist": "x"}
        for number in range(40)
    ]
    values = section(source(jsonl(tmp_path / "a.jsonl", some)), deduplicate={"exact": True, "near": None})
    with pytest.raises(
        DataError, match=r"^leak: texts in test are near texts in train \(at least 0\.8\): talks:1"
    ):
        run.start(values)
    assert len(Run(tmp_path / "allowed").start({**values, "leakage": None}).all()) == 40


def test_pins_that_tear_a_group_end_the_stage(tmp_path: Path, run: Run) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows(5))
    one, other = (source(path, name=split, split=split) for split in ("train", "test"))
    with pytest.raises(
        DataError, match=r"train:1\.\d is pinned to train and test:1\.\d to test, but both are in gr"
    ):
        run.start(section(one, other))


def test_nothing_to_train_on_ends_the_stage(tmp_path: Path, run: Run) -> None:
    with pytest.raises(DataError, match="none of 5 examples is in train"):
        run.start(section(source(jsonl(tmp_path / "a.jsonl", rows(5)), split="test")))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"columns": {"id": "name"}}, "name neither input nor instruction"),
        ({"columns": {"input": "{talk"}}, "columns.input"),
        ({"columns": {"input": "plain {} text"}}, "columns.input"),
        ({"columns": {"inptu": "talk"}}, "inptu"),
        ({"outputs": []}, "outputs"),
        ({"name": "../x"}, "name"),
        ({"weight": 1.0}, "one weight alone"),
        ({"task": "other"}, "templates has none for other"),
        ({"columns": {"input": "talk", "instruction": "gist"}}, "no source uses the templates of summarize"),
        ({"format": "xml"}, "format"),
    ],
)
def test_wrong_params_name_the_key(changes: Row, expected: str, run: Run) -> None:
    with pytest.raises(ParamsError, match=expected):
        run.start(section(source("x.jsonl", **changes)))


# --- the real entry point


def stage(folder: Path, values: Row) -> subprocess.CompletedProcess[str]:
    compute = {"device": "cpu", "precision": "fp32", "threads": 1, "processes": 1, "accelerate": None}
    params = {"seed": 0, "compute": compute, "prepare": values}
    (folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")
    (folder / "dvc.yaml").write_text(
        "stages: {prepare: {cmd: python -m tasks.prepare, params: [seed, prepare]}}", encoding="utf-8"
    )
    return subprocess.run(
        [sys.executable, "-m", "tasks.prepare"],
        cwd=folder,
        env={**os.environ, "LIFECYCLE_TRACKING": "off"},
        capture_output=True,
        text=True,
    )


def test_the_stage_writes_where_the_pipeline_looks(tmp_path: Path) -> None:
    jsonl(tmp_path / "talks.jsonl", rows(60))
    done = stage(tmp_path, section(source("talks*.jsonl")))
    assert (done.returncode, done.stderr) == (0, "")
    for name in (
        "data/examples/train.jsonl",
        "data/text/validation.jsonl",
        "data/rejects.jsonl",
        "reports/data.md",
        "reports/data/lengths.png",
    ):
        assert (tmp_path / name).is_file()
    metrics = json.loads((tmp_path / "metrics/prepare.json").read_text(encoding="utf-8"))
    assert metrics["examples_read"] == 60
    assert str(tmp_path) not in (tmp_path / "reports/data.md").read_text(encoding="utf-8")


def hub(**changes: Any) -> Row:
    mapped = {key: value for key, value in source("x").items() if key not in ("paths", "format")}
    return {**mapped, "kind": "hub", "id": "knkarthick/dialogsum", "revision": "main", "subset": None} | {
        "hub_split": "train",
        **changes,
    }


@pytest.mark.parametrize(
    ("name", "data", "examples", "expected"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(os.urandom(5000))[:-30],
            source("a.jsonl.gz"),
            "the gzip stream ends too early",
        ),
        ("a.jsonl", b'{"talk": "a", "gist": ""}', source("a.jsonl"), "a.jsonl line 1, column gist: found"),
        ("a.jsonl", b"", hub(), "hub data set knkarthick/dialogsum at revision main cannot be loaded"),
        ("a.jsonl", b"", source("a.jsonl", formt="x"), "formt"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(
    name: str, data: bytes, examples: Row, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    ended = stage(tmp_path, section(examples))
    assert ended.returncode == 2
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert expected in line and line.startswith("prepare: ")


def test_a_hub_data_set_is_loaded_at_its_revision_without_its_code(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls: list[tuple[tuple[Any, ...], Row]] = []

    def load(*names: Any, **options: Any) -> datasets.Dataset:
        calls.append((names, options))
        return datasets.Dataset.from_list(rows(30))

    monkeypatch.setattr(datasets, "load_dataset", load)
    run.start(section(hub(revision="abc", subset="en")))
    assert calls == [(("knkarthick/dialogsum", "en"), {"split": "train", "revision": "abc"})]
    assert len(run.all()) == 30
    with pytest.raises(DataError, match="column 'nothing' is missing; it has name, talk, gist, by"):
        run.start(section(hub(outputs=["nothing"])))


def test_importing_the_stage_is_light() -> None:
    script = (
        "import sys, tasks.prepare; "
        "print(sorted({'numpy', 'torch', 'pyarrow', 'datasets', 'matplotlib', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\n"
        "from tasks.data import corpus\n"
        "corpus.CHUNKS_HERE = 0\n"
        "if __name__ == '__main__':\n"
        "    for _ in corpus.in_order(time.sleep, iter([0.0, 600.0, 600.0]), 2):\n"
        "        print('working', flush=True)\n",
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "working\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(signal.SIGKILL)
    assert len(children) >= 2
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive and len(gone) == len(children)


# --- the data of others


SUMMARIZE = {
    "summarize": ["Summarize the conversation.\n\n{input}\n\nSummary:", "{input}\n\nWhat was that about?"]
}


@pytest.mark.real_data
def test_dialogsum_loads_with_a_mapping_alone(real_data: Path, run: Run) -> None:
    mapped = source(
        real_data / "dialogsum/dev.jsonl",
        name="dialogsum",
        columns={"id": "fname", "input": "dialogue", "group": "dialogue"},
        outputs=["summary"],
    )
    text = {
        "sources": [
            text_source(
                real_data / "dialogsum/dev.jsonl",
                format="jsonl",
                columns={"text": "dialogue", "group": "dialogue"},
            )
        ],
        "validation": 0.05,
        "deduplicate": {"exact": True, "near": 0.8},
    }
    run.start(section(mapped, templates=SUMMARIZE, max_field_chars=20_000, text=text))
    assert run.metrics["examples_read"] == 500 and run.metrics["examples_rejected"] == 0
    assert run.metrics["examples_repeats"] + run.metrics["examples_near"] + len(run.all()) == 500
    assert len(run.all()) > 490
    assert all("#Person1#" in example.prompt for example in run.all())
    held_out = {example.input for split in SPLITS[1:] for example in run.examples(split)}
    assert not held_out & set(run.texts("train")) and len(run.texts("train")) > 300


@pytest.mark.real_data
def test_gsm8k_and_big_bench_hard_mix_with_a_mapping_alone(real_data: Path, run: Run) -> None:
    gsm8k = source(
        real_data / "gsm8k/test.jsonl",
        name="gsm8k",
        task="arithmetic",
        columns={"input": "question"},
        outputs=["answer"],
    )
    bbh = source(
        real_data / "bbh/*.json",
        name="bbh",
        format="json",
        task="reasoning",
        columns={"input": "input"},
        outputs=["target"],
        split="test",
    )
    templates = {"arithmetic": ["Solve step by step.\n{input}"], "reasoning": ["{input}\nAnswer:"]}
    run.start(
        section(
            gsm8k, bbh, templates=templates, max_field_chars=20_000, deduplicate={"exact": True, "near": None}
        )
    )
    assert run.metrics["examples_read"] == 1660
    assert run.metrics["reasoning_train"] == run.metrics["reasoning_validation"] == 0
    assert run.metrics["reasoning_test"] + run.metrics["examples_repeats"] >= 990
    assert run.metrics["arithmetic_train"] > 450
    assert {example.id.partition(".")[0] for example in run.examples("test")} >= {
        "bbh:1",
        "bbh:2",
        "bbh:3",
        "bbh:4",
    }


@pytest.mark.real_data
def test_hh_rlhf_loads_as_rankings_with_a_mapping_alone(real_data: Path) -> None:
    columns = RankingColumns(
        completions=("chosen", "rejected"), ties=None, prompt=None, marker="\n\nAssistant:", group=None
    )
    files = Files(
        kind="file", name="hh", paths=(str(real_data / "hh-rlhf/harmless-pairs.jsonl.gz"),), format="jsonl"
    )
    made: list[Ranking] = []
    faults: list[Fault] = []
    for _, row in (
        pair for chunk in sources.read(files, 0, columns.needed, 100_000) for pair in chunk.numbered()
    ):
        try:
            made.append(ranking(row, columns, 100_000))
        except Fault as fault:
            faults.append(fault)
    assert len(made) + len(faults) == 1156
    assert len(made) > 1140
    assert all(one.prompt.endswith("Assistant:") and one.prompt.startswith("Human:") for one in made)
    assert all(one.pairs == ((0, 1),) and one.completions[0] != one.completions[1] for one in made)
    assert {fault.expected for fault in faults} <= {
        "text that is not blank",
        "the same completion stands at two ranks that are not tied",
    }
    assert len({one.group for one in made}) > 1000
