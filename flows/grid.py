"""What a sweep tries: `--set KEY=VALUE,VALUE` as the points of a grid, `--search KEY=LOW..HIGH` as ranges.

Values are those of a YAML list without its brackets: `[a, b]`, `{k: v}` and "quoted, text" are one value each.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.stage.errors import ParamsError, one_line

NAME_LENGTH = 40
POINTS = 1000  # more is a slip of the hand
NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class Range:
    """What a search chooses one param from: the numbers from `low` to `high`, or one of `choices`.

    Whole ends mean whole numbers; `log` draws small and large numbers alike.
    """

    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


def axis(setting: str, option: str = "--set") -> tuple[str, list[Any]]:
    """`finetune.method=full,lora` → ("finetune.method", ["full", "lora"]). Raises ParamsError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ParamsError(f"{option} {setting}: expected section.key=value,value")
    try:
        values = YAML(typ="safe", pure=True).load(f"[{text}]")
    except MarkedYAMLError as error:
        raise ParamsError(
            f"{option} {setting}: {text} are no YAML values with commas between them: "
            f"{one_line(error.problem or error)}"
        ) from None
    if not isinstance(values, list) or not values:
        raise ParamsError(f"{option} {setting}: there is no value")
    return key, _distinct(values)


def points(settings: Iterable[str]) -> list[dict[str, Any]]:
    """Every combination of the values, the last key changing fastest. Raises ParamsError."""
    axes: dict[str, list[Any]] = {}
    for setting in settings:
        key, values = axis(setting)
        if key in axes:
            raise ParamsError(f"--set {key}: given twice; write its values with commas between them")
        axes[key] = values
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(found) > POINTS:
        raise ParamsError(f"the grid has {len(found)} points: at most {POINTS}")
    return found


def searched(settings: Iterable[str]) -> dict[str, Range]:
    """`--search` settings: KEY=LOW..HIGH, KEY=LOW..HIGH:log, or KEY=VALUE,VALUE. Raises ParamsError."""
    found: dict[str, Range] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key in found:
            raise ParamsError(f"--search {key}: given twice")
        numbers = re.fullmatch(rf"({NUMBER})\.\.({NUMBER})(:log)?", text)
        if numbers is None:
            key, values = axis(setting, "--search")
            if len(values) < 2:
                raise ParamsError(f"--search {setting}: expected LOW..HIGH, LOW..HIGH:log or VALUE,VALUE")
            found[key] = Range(choices=tuple(values))
            continue
        low, high, log = _number(numbers[1]), _number(numbers[2]), bool(numbers[3])
        if not low < high or (log and low <= 0):
            above = "0 < LOW < HIGH" if log else "LOW < HIGH"
            raise ParamsError(f"--search {setting}: expected {above}")
        found[key] = Range(low, high, log)
    return found


def as_setting(key: str, value: Any) -> str:
    """`key=value` as `lifecycle run --set` reads it."""
    return f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"


def name(number: int, settings: Mapping[str, Any], differing: Sequence[str]) -> str:
    """A name for a point: its number, and the values that tell it from others: `3-lora-0.05`."""
    values = [_word(settings[key]) for key in differing]
    words = "-".join(word for word in values if word)[:NAME_LENGTH].strip("-.")
    return f"{number}-{words}" if words else str(number)


def differing(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all points."""
    keys = dict.fromkeys(key for point in points for key in point)
    return [key for key in keys if len(_distinct([point.get(key) for point in points])) > 1]


def _word(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Values without repetitions; 1, 1.0 and true differ."""
    return list({json.dumps(value, default=str): value for value in values}.values())


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
