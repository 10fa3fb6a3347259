"""What a sweep tries: the syntax of its settings, the points, their names, and which of them runs next."""

import pytest

from flows import grid
from flows.grid import Range
from flows.sweep import Grid, Record
from tasks.stage import ParamsError


def test_values_are_those_of_a_yaml_list() -> None:
    assert grid.axis("finetune.method=full,lora") == ("finetune.method", ["full", "lora"])
    assert grid.axis("a.b=[x, y],null,{k: [1, 2]}") == ("a.b", [["x", "y"], None, {"k": [1, 2]}])
    assert grid.axis('a.b="x, y",1e-5,true') == ("a.b", ["x, y", 1e-5, True])
    assert grid.axis("a.b=1,1,1.0,true") == ("a.b", [1, 1.0, True]), "each once, by what it is in the file"


@pytest.mark.parametrize(
    "setting", ["a.b", "a..b=1", "=1", "a.b=", "a.b=[x", "a.b=x,,y", 'a.b="x'],
)  # fmt: skip
def test_a_setting_that_is_none_is_named(setting: str) -> None:
    with pytest.raises(ParamsError, match="--set ") as caught:
        grid.points([setting])
    assert setting in str(caught.value) and "\n" not in str(caught.value)


def test_points_are_all_combinations_and_the_last_key_changes_fastest() -> None:
    found = grid.points(["a.x=1,2", "b.y=p,q", "c.z=0"])
    assert [(point["a.x"], point["b.y"]) for point in found] == [(1, "p"), (1, "q"), (2, "p"), (2, "q")]
    assert grid.differing(found) == ["a.x", "b.y"]
    assert all(point["c.z"] == 0 for point in found)
    with pytest.raises(ParamsError, match="given twice"):
        grid.points(["a.x=1", "a.x=2"])
    with pytest.raises(ParamsError, match="1024 points"):
        grid.points([f"a.{letter}=1,2" for letter in "abcdefghij"])


def test_a_name_says_what_is_different_and_is_a_plain_file_name() -> None:
    point = {"a.x": "../evil name", "b.y": 0.05, "c.z": [1, "two"]}
    assert grid.name(3, point, ["b.y"]) == "3-0.05"
    assert grid.name(3, point, list(point)) == "3-evil-name-0.05-1-two"
    assert grid.name(1, {}, []) == "1"


def test_ranges_of_a_search() -> None:
    assert grid.searched(["a.x=0.0005..0.01:log", "a.n=4..16", "a.m=lora,ia3"]) == {
        "a.x": Range(0.0005, 0.01, log=True), "a.n": Range(4, 16), "a.m": Range(choices=("lora", "ia3")),
    }  # fmt: skip
    assert grid.searched(["a.n=4..16"])["a.n"].whole and not grid.searched(["a.n=4..16.0"])["a.n"].whole


@pytest.mark.parametrize(
    "setting", ["a.x=2..1", "a.x=1..1", "a.x=0..1:log", "a.x=5", "a.x=1..2:cube", "a.x=1...2", "a.x"],
)  # fmt: skip
def test_a_range_that_is_none_is_named(setting: str) -> None:
    with pytest.raises(ParamsError) as caught:
        grid.searched([setting])
    assert f"--search {setting}" in str(caught.value)


def test_beside_a_running_point_the_next_is_one_that_shares_little_with_it() -> None:
    points = grid.points(["early.x=1,2", "late.y=1,2"])
    records = [Record(number, str(number), point) for number, point in enumerate(points)]
    records[3].state = "done"
    plan = Grid(records, ["early", "late"])
    first = plan.take([])
    assert first is records[0]
    assert plan.take([first]) is records[2], "1 would wait for the early stage of 0"
    assert plan.take([first, records[2]]) is records[1]
    assert plan.take([first]) is None, "what is done is not run again"
