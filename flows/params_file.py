"""`--set` and `--preset` write params.yaml, so that what ran is what git shows. Comments and order stay."""

import difflib
import io
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from tasks.stage.errors import ParamsError, one_line
from tasks.stage.files import write_text
from tasks.stage.params import GRAPH_FILE, PARAMS_FILE, check_all

PRESETS = Path("presets")
MOST_NAMESAKES = 6  # keys that one hint can name


def change(root: Path, presets: Iterable[str] = (), settings: Iterable[str] = ()) -> list[str]:
    """Merge the presets into params.yaml, then the settings (`section.key=value`), and check the whole.

    The file is written once, and only when all is well. Returns the lines `key: before → after`. Raises
    ParamsError for an unknown preset or key, or a value that the section does not allow.
    """
    return edit(root, _merging(root, presets, settings))


def edit(root: Path, alter: Callable[[CommentedMap], None]) -> list[str]:
    """Let `alter` change what params.yaml holds; as `change` in all else."""
    path = root / PARAMS_FILE
    text = path.read_text(encoding="utf-8")
    new, changed = _edited(root, text, alter)
    if changed:
        write_text(path, new)
    return changed


def changed_text(
    root: Path, text: str, presets: Iterable[str] = (), settings: Iterable[str] = ()
) -> tuple[str, list[str]]:
    """What `change` would write where params.yaml is `text`, and its lines; nothing is written."""
    return _edited(root, text, _merging(root, presets, settings))


def _merging(root: Path, presets: Iterable[str], settings: Iterable[str]) -> Callable[[CommentedMap], None]:
    def merge(data: CommentedMap) -> None:
        for name in presets:
            _merge(data, _preset(root, name), (), f"{PRESETS}/{name}.yaml")
        for setting in settings:
            keys, value = parse(setting)
            _merge(data, _nested(keys, value), (), f"--set {setting}")

    return merge


def _edited(root: Path, text: str, alter: Callable[[CommentedMap], None]) -> tuple[str, list[str]]:
    data = _load(text, str(PARAMS_FILE))
    before = _flat(data)
    alter(data)
    after = _flat(data)
    changed = [
        f"{key}: {_shown(before, key)} → {_shown(after, key)}"
        for key in dict.fromkeys([*before, *after])
        if _shown(before, key) != _shown(after, key)
    ]
    if not changed:
        return text, []
    new = _dump(data, text)
    _check(root, new)
    return new, changed


def _check(root: Path, text: str) -> None:
    """Check params before they are written where a stage could read them."""
    candidate = root / ".work" / PARAMS_FILE
    write_text(candidate, text)
    try:
        check_all(candidate, root / GRAPH_FILE)
    except ParamsError as error:
        raise ParamsError(str(error).replace(str(candidate), str(PARAMS_FILE))) from None
    finally:
        candidate.unlink()


def _preset(root: Path, name: str) -> Mapping[str, Any]:
    path = root / PRESETS / f"{name}.yaml"
    if not path.is_file():
        names = sorted(found.stem for found in (root / PRESETS).glob("*.yaml"))
        known = ", ".join(names) or "none"
        raise ParamsError(f"--preset {name}: no such preset{_nearest(name, names)}; there are: {known}")
    return _load(path.read_text(encoding="utf-8"), f"{PRESETS}/{path.name}")


def parse(setting: str) -> tuple[list[str], Any]:
    """`finetune.lora.r=8` → (["finetune", "lora", "r"], 8); the value is YAML."""
    name, equals, text = setting.partition("=")
    if not equals or not all(name.split(".")):
        raise ParamsError(f"--set {setting}: expected section.key=value")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        raise ParamsError(
            f"--set {setting}: {text} is no YAML value: {one_line(error.problem or error)}"
        ) from None
    return name.split("."), _in_any_yaml(value)


def _in_any_yaml(value: Any) -> Any:
    """`value` such that a YAML 1.1 reader sees what a 1.2 reader sees: `no` in quotes, 1e-05 as 1.0e-05."""
    if isinstance(value, str):
        return value if _plain(value) else DoubleQuotedScalarString(value)
    if isinstance(value, float):
        text = repr(value)
        return value if "." in text else YAML().load(text.replace("e", ".0e"))
    if isinstance(value, list):
        return [_in_any_yaml(item) for item in value]
    if isinstance(value, dict):
        return {key: _in_any_yaml(item) for key, item in value.items()}
    return value


def _plain(text: str) -> bool:
    """Whether text without quotes is text to a YAML 1.1 reader."""
    try:
        return bool(yaml.safe_load(text) == text)
    except (yaml.YAMLError, ValueError):
        return False


def _merge(target: CommentedMap, new: Mapping[str, Any], above: tuple[str, ...], where: str) -> None:
    """Put `new` into `target`: mappings key by key, anything else in place of what was there.

    A mapping of another `kind` takes the place of the one that is there: it has keys of its own. Sections and
    their keys are all in the file already; what a key holds may be free (a column mapping, say), and is checked
    with the section.
    """
    for key, value in new.items():
        if key not in target and len(above) < 2:
            dotted = ".".join([*above, key])
            known = _flat(target, "".join(f"{each}." for each in above))
            raise ParamsError(f"{where}: {dotted}: no such key{_meant(dotted, list(known))}")
        there = target.get(key)
        if isinstance(value, Mapping) and isinstance(there, CommentedMap) and _same_kind(there, value):
            _merge(target[key], value, (*above, key), where)
        else:
            target[key] = value


def _same_kind(there: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" not in new or there.get("kind") == new["kind"]


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    nested: dict[str, Any] = value
    return nested


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _meant(dotted: str, known: list[str]) -> str:
    """A hint: keys of the same name that stand deeper, or else the key most like `dotted`."""
    *above, key = dotted.split(".")
    namesakes = [name for name in known if name.endswith(f".{key}")]
    if 0 < len(namesakes) <= MOST_NAMESAKES:
        return f"; did you mean {' or '.join(namesakes)}?"
    return _nearest(dotted, list({".".join(name.split(".")[: len(above) + 1]): None for name in known}))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names; a list counts as one value."""
    if not isinstance(value, Mapping) or not value:
        return {prefix.removesuffix("."): value}
    return {
        name: found for key, inner in value.items() for name, found in _flat(inner, f"{prefix}{key}.").items()
    }


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    value = values[key]
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, CommentedSeq) else value)


def _load(text: str, name: str) -> CommentedMap:
    try:
        found = _yaml(text).load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ParamsError(f"{name}:{line}: {one_line(error.problem or error)}") from None
    if not isinstance(found, CommentedMap):
        raise ParamsError(f"{name}: expected sections (name: …)")
    return found


def _dump(data: CommentedMap, before: str) -> str:
    stream = io.StringIO()
    _yaml(before).dump(data, stream)
    return stream.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes `null` as it stands in params.yaml, not as nothing."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _yaml(text: str) -> YAML:
    """A round-trip reader and writer in the style of `text`."""
    style = YAML()
    style.Representer = _Representer
    style.preserve_quotes = True
    style.width = 4096  # no line is folded
    item = re.search(r"^( *)[^\s#-].*:.*\n(?: *#.*\n)*( *)- ", text, re.MULTILINE)
    offset = len(item[2]) - len(item[1]) if item else 2
    style.indent(mapping=2, sequence=offset + 2, offset=offset)
    return style
