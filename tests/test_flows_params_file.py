"""`--set` and `--preset`: what is written, what is refused, and what stays as it was."""

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from ruamel.yaml import YAML

from flows.params_file import _merge, change
from tasks.stage import ParamsError, Section

ROOT = Path(__file__).parents[1]
PARAMS = """\
# what runs
seed: 1  # any integer
compute: {device: cpu, precision: fp32, threads: null, processes: 1, accelerate: null}

tune:  # the section
  # in steps
  learning_rate: 0.001  # Adam
  method: lora
  targets:
    - q
    - v
  columns: {text: dialogue}
  lora:
    rank: 8
    dropout: 0.0
"""


class Lora(Section):
    rank: int
    dropout: float


class Params(Section):
    learning_rate: float
    method: str
    targets: tuple[str, ...]
    columns: dict[str, str]
    lora: Lora


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = ModuleType("tasks.tune")
    module.__dict__["Params"] = Params
    monkeypatch.setitem(sys.modules, "tasks.tune", module)
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "dvc.yaml").write_text("stages:\n  tune: {cmd: python -m tasks.tune}\n")
    (tmp_path / "presets").mkdir()
    return tmp_path


def read(root: Path) -> str:
    return (root / "params.yaml").read_text()


def test_a_setting_changes_its_line_alone(root: Path) -> None:
    told = change(root, settings=["tune.lora.rank=16"])
    assert told == ["tune.lora.rank: 8 → 16"]
    assert read(root) == PARAMS.replace("rank: 8", "rank: 16")


def test_lists_keep_their_indentation(root: Path) -> None:
    flush = PARAMS.replace("    - ", "  - ")
    (root / "params.yaml").write_text(flush)
    change(root, settings=["seed=7"])
    assert read(root) == flush.replace("seed: 1", "seed: 7")


def test_comments_and_order_stay_around_what_changes(root: Path) -> None:
    change(root, settings=["seed=7", "tune.learning_rate=3e-3"])
    assert read(root) == PARAMS.replace("seed: 1", "seed: 7").replace("0.001", "0.003")


def test_a_preset_merges_mappings_and_replaces_lists(root: Path) -> None:
    (root / "presets" / "small.yaml").write_text(
        "tune:\n  lora: {rank: 2}\n  targets: [o]\n  columns: {title: t}\n"
    )
    change(root, presets=["small"])
    tune = yaml.safe_load(read(root))["tune"]
    assert tune["lora"] == {"rank": 2, "dropout": 0.0}
    assert tune["targets"] == ["o"]
    assert tune["columns"] == {"text": "dialogue", "title": "t"}
    assert "# the section" in read(root)


def test_settings_win_over_presets(root: Path) -> None:
    (root / "presets" / "small.yaml").write_text("tune: {lora: {rank: 2}}\n")
    change(root, presets=["small"], settings=["tune.lora.rank=4"])
    assert yaml.safe_load(read(root))["tune"]["lora"]["rank"] == 4


@pytest.mark.parametrize(
    "text", ["no", "on", "null and void", "1e-3", "0x1F", "12:30", "~", "yes", "a: b", "# x", "'"]
)
def test_text_is_text_for_every_yaml_reader(text: str, root: Path) -> None:
    """YAML 1.1 reads `no` as false where 1.2 reads text; what is written means the same to both."""
    change(root, settings=[f"tune.method='{text.replace(chr(39), chr(39) * 2)}'"])
    assert yaml.safe_load(read(root))["tune"]["method"] == text
    assert YAML(typ="safe").load(read(root))["tune"]["method"] == text


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1e-05", 1e-05), ("2.5E+6", 2.5e6), ("-1e3", -1000.0), ("0", 0)]
)
def test_floats_are_floats_for_every_yaml_reader(text: str, value: float, root: Path) -> None:
    change(root, settings=[f"tune.learning_rate={text}"])
    assert yaml.safe_load(read(root))["tune"]["learning_rate"] == value
    assert YAML(typ="safe").load(read(root))["tune"]["learning_rate"] == value


def test_one_setting_changes_one_line_of_this_repositorys_params(tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    change(tmp_path, settings=["distill.control.epochs=7"])
    before, after = ((folder / "params.yaml").read_text().splitlines() for folder in (ROOT, tmp_path))
    assert [line for line in after if line not in before] == ["    epochs: 7"]
    change(tmp_path, settings=["distill.control=null"])
    assert "  control: null" in (tmp_path / "params.yaml").read_text()


def test_nothing_changed_writes_nothing(root: Path) -> None:
    before = (root / "params.yaml").stat().st_mtime_ns
    assert change(root, settings=["seed=1", "tune.targets=[q, v]"]) == []
    assert (root / "params.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tune.metod=1", "--set tune.metod=1: tune.metod: no such key; did you mean tune.method?"),
        ("tune.rank=2", "--set tune.rank=2: tune.rank: no such key; did you mean tune.lora.rank?"),
        ("rank=2", "--set rank=2: rank: no such key; did you mean tune.lora.rank?"),
        ("tone.method=x", "--set tone.method=x: tone: no such key; did you mean tune?"),
        ("tune.lora.rnk=2", "params.yaml: tune.lora.rnk: unknown key; did you mean rank?"),
        ("tune.lora.rank=many", 'params.yaml: tune.lora.rank: found "many", expected a valid integer'),
        ("seed", "--set seed: expected section.key=value"),
        ("tune..x=1", "--set tune..x=1: expected section.key=value"),
        ("tune.targets=[q", "--set tune.targets=[q: [q is no YAML value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line_and_not_written(setting: str, message: str, root: Path) -> None:
    with pytest.raises(ParamsError) as raised:
        change(root, settings=["seed=5", setting])
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert read(root) == PARAMS
    assert list((root / ".work").glob("*")) == [] if (root / ".work").exists() else True


def test_an_unknown_preset_names_those_that_exist(root: Path) -> None:
    (root / "presets" / "small.yaml").write_text("seed: 2\n")
    with pytest.raises(
        ParamsError, match="--preset smal: no such preset; did you mean small\\?; there are: small"
    ):
        change(root, presets=["smal"])
    (root / "presets" / "small.yaml").write_text("seed: [2\n")
    with pytest.raises(ParamsError, match=r"^presets/small\.yaml:2: "):
        change(root, presets=["small"])


def test_a_mapping_of_another_kind_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    source = {"kind": "oracle", "answers": 2}
    target = YAML().load("source: {kind: oracle, answers: 2}\n")
    _merge(target, {"source": {"kind": "oracle", "answers": 3}}, ("feedback",), "here")
    assert target["source"] == {**source, "answers": 3}
    _merge(target, {"source": {"kind": "rankings", "test": 0.1}}, ("feedback",), "here")
    assert target["source"] == {"kind": "rankings", "test": 0.1}
