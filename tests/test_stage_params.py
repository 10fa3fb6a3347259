"""params.yaml: every kind of mistake is one line that names the key, what was found and what is allowed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, PositiveFloat, model_validator

from tasks.stage import ParamsError, Section
from tasks.stage.params import check_all, check_sections, read_section, read_shared, read_yaml, validate

GOOD = """\
seed: 7
compute: {device: auto, precision: fp32, threads: null, processes: 1, accelerate: null}
toy:
  rate: 1e-3
  steps: 10
  limit: null
  names: [a, b]
  method: {name: lora, rank: 4}
  sources:
    - {kind: file, path: x.jsonl}
    - {kind: hub, id: org/name}
"""


class Full(Section):
    name: Literal["full"]


class Lora(Section):
    name: Literal["lora"]
    rank: int


class File(Section):
    kind: Literal["file"]
    path: Path


class Hub(Section):
    kind: Literal["hub"]
    id: str


class Params(Section):
    rate: PositiveFloat
    steps: int | Literal["auto"]
    limit: int | None
    names: tuple[str, ...]
    method: Annotated[Full | Lora, Field(discriminator="name")]
    sources: tuple[Annotated[File | Hub, Field(discriminator="kind")], ...]


def read(folder: Path, text: str) -> Params:
    file = folder / "params.yaml"
    file.write_text(text, encoding="utf-8")
    data = read_yaml(file)
    check_sections(data, ["toy", "other"], file)
    read_shared(data, file)
    return read_section(data, "toy", Params, file)


def test_a_good_file_is_read_as_typed(tmp_path: Path) -> None:
    params = read(tmp_path, GOOD)
    assert params.rate == 0.001  # YAML 1.2, as DVC reads it: YAML 1.1 would take 1e-3 for text
    assert params.names == ("a", "b")
    assert params.sources == (File(kind="file", path=Path("x.jsonl")), Hub(kind="hub", id="org/name"))


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        (
            "rate: 1e-3",
            "rte: 1e-3",
            ["toy.rte: unknown key", "did you mean rate?", "allowed: rate, steps"],
        ),
        ("  rate: 1e-3\n", "", ["toy.rate: missing"]),
        ("rate: 1e-3", "rate: fast", ['toy.rate: found "fast", expected a valid number']),
        ("rate: 1e-3", "rate: '0.1'", ['toy.rate: found "0.1"', "write it without quotes"]),
        ("rate: 1e-3", "rate: -1", ["toy.rate: found -1, expected greater than 0"]),
        ("rate: 1e-3", "rate: .inf", ["toy.rate: found Infinity", "finite"]),
        ("steps: 10", "steps: 1.5", ["toy.steps: found 1.5, expected a valid integer", "or auto"]),
        ("steps: 10", "steps: true", ["toy.steps: found true, expected a valid integer"]),
        ("limit: null", "limit: no", ['toy.limit: found "no", expected a valid integer']),
        ("names: [a, b]", "names: a", ['toy.names: found "a", expected a valid array']),
        ("names: [a, b]", "names: [a, 3]", ["toy.names.1: found 3, expected a valid string"]),
        ("name: lora", "name: lorra", ['found "lorra", expected one of full, lora; did you mean lora?']),
        ("rank: 4", "rnk: 4", ["toy.method.rnk: unknown key", "did you mean rank?", "allowed: name, rank"]),
        ("rank: 4", "rank: x", ['toy.method.rank: found "x"']),
        (
            "path: x.jsonl",
            "pth: x",
            ["toy.sources.0.pth: unknown key", "mean path?", "allowed: kind, path"],
        ),
        ("kind: hub", "kind: hup", ["toy.sources.1", 'found "hup"', "did you mean hub?"]),
        ("device: auto", "device: gpu", ['compute.device: found "gpu", expected one of auto, cpu, cuda, mps']),
        ("seed: 7", "seed: x", ['seed: found "x", expected a valid integer']),
        ("seed: 7\n", "", ["seed: missing"]),
        ("toy:", "tyo:", ["tyo: no such key", "did you mean toy?", "allowed: seed, compute, toy, other"]),
        (GOOD[GOOD.index("toy:") :], "", ["section toy is missing"]),
        (GOOD[GOOD.index("toy:") :], "toy: 3\n", ["toy: expected keys (rate, steps", "found 3"]),
        ("steps: 10", "steps: 10\n  steps: 11", ["params.yaml:6", 'duplicate key "steps"']),
        ("[a, b]", "[a, b", ["params.yaml:"]),
        (GOOD, "- a list\n", ["expected sections", "a list"]),
        (GOOD, "", ["expected sections", "null"]),
    ],
)
def test_each_mistake_is_one_line_that_tells_how_to_mend_it(
    tmp_path: Path, good: str, bad: str, expected: list[str]
) -> None:
    assert good in GOOD
    with pytest.raises(ParamsError) as caught:
        read(tmp_path, GOOD.replace(good, bad, 1))
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "params.yaml") in message
    for part in expected:
        assert part in message


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"\(and 2 more: toy.names, toy.method.rank\)"):
        read(tmp_path, GOOD.replace("1e-3", "x").replace("[a, b]", "3").replace("rank: 4", "rank: x"))


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="not found: run this in the root"):
        read_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(ParamsError, match="byte 6 is not UTF-8"):
        read_yaml(tmp_path / "params.yaml")


def test_the_whole_file_is_checked_against_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("toy", "other"):
        monkeypatch.setitem(sys.modules, f"tasks.{stage}", SimpleNamespace(Params=Params))
    params, graph = tmp_path / "params.yaml", tmp_path / "dvc.yaml"
    graph.write_text("stages:\n  toy: {cmd: x}\n  other: {cmd: x}\n", encoding="utf-8")
    params.write_text(GOOD + GOOD[GOOD.index("toy:") :].replace("toy", "other"), encoding="utf-8")
    check_all(params, graph)
    params.write_text(GOOD.replace("seed: 7", "sed: 7").replace("steps: 10", "steps: x"), encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        check_all(params, graph)
    lines = str(caught.value).replace(f"{params}: ", "").splitlines()
    assert [line.split(":")[0] for line in lines] == ["sed", "seed", "toy.steps", "section other is missing"]


def test_a_secret_in_the_wrong_place_is_not_repeated(tmp_path: Path) -> None:
    token = "hf_" + "a1B2" * 8
    with pytest.raises(ParamsError) as caught:
        read(tmp_path, GOOD.replace("rate: 1e-3", f"rate: {token}"))
    assert token not in str(caught.value)


def test_a_default_in_python_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Sloppy\.rate has a default: its value belongs in params\.yaml"):

        class Sloppy(Section):
            rate: float = 0.1


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Full(name="full").name = "full"


class Span(Section):
    low: int
    high: int

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


def test_keys_that_do_not_go_together_are_told_in_the_words_of_the_section(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    with pytest.raises(ParamsError) as raised:
        validate({"low": 3, "high": 2}, "span", Span, file)
    assert str(raised.value) == f"{file}: span: low 3 is above high 2"
