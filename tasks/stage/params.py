"""params.yaml, read into typed sections: every fault is one line: the key, what was found, what is allowed.

The file is read by the parser DVC uses (YAML 1.2), so that what DVC tracks is what a stage sees.
"""

import difflib
import importlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from pydantic_core import ErrorDetails

from tasks.stage.errors import ParamsError, one_line
from tasks.stage.secrets import redact

PARAMS_FILE = Path("params.yaml")
GRAPH_FILE = Path("dvc.yaml")
COMMANDS = ("register", "promote")  # these have sections too; the class of each is in tasks.registry.COMMAND


class Section(BaseModel):
    """A section of params.yaml. Frozen, without unknown keys, and without defaults: a default in Python is a
    hyper-parameter that DVC cannot track."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if not field.is_required():
                raise TypeError(f"{cls.__name__}.{name} has a default: its value belongs in params.yaml")


class Compute(Section):
    """Where and how tensors are computed; `threads` (of each process) null leaves the number to torch.

    Stages that train do so in that many `processes`, over all machines, started by `accelerate launch` with the
    configuration `accelerate`: the name of one in infra/accelerate/, or a path (null: ddp).
    """

    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["auto", "fp32", "bf16"]
    threads: PositiveInt | None
    processes: PositiveInt
    accelerate: Annotated[str, Field(min_length=1)] | None


class Shared(Section):
    """What every stage reads besides its own section."""

    seed: int
    compute: Compute


AnySection = TypeVar("AnySection", bound=Section)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ParamsError when it is missing, unreadable or no mapping."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        found = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} not found: run this in the root of the repository") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: byte {error.start} is not UTF-8") from None
    except MarkedYAMLError as error:
        where = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ParamsError(f"{path}{where}: {error.problem or 'not YAML'}") from None
    except YAMLError as error:
        raise ParamsError(f"{path}: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ParamsError(f"{path}: expected sections (name: ...), found {_shown(found)}")
    return found


def read_section(
    data: Mapping[str, Any], name: str, section: type[AnySection], file: Path = PARAMS_FILE
) -> AnySection:
    """The section `name` of the parsed file. Raises ParamsError."""
    if name not in data and section.model_fields:
        raise ParamsError(f"{file}: section {name} is missing")
    return validate(data.get(name, {}), name, section, file)


def read_shared(data: Mapping[str, Any], file: Path = PARAMS_FILE) -> Shared:
    """`seed` and `compute` of the parsed file. Raises ParamsError."""
    return validate({key: data[key] for key in Shared.model_fields if key in data}, "", Shared, file)


def check_sections(data: Mapping[str, Any], stages: Iterable[str], file: Path = PARAMS_FILE) -> None:
    """Raise ParamsError for a top-level key that no stage and no command reads."""
    allowed = [*Shared.model_fields, *stages, *COMMANDS]
    for key in data:
        if key not in allowed:
            raise ParamsError(
                f"{file}: {key}: no such key{_nearest(key, allowed)}; allowed: {', '.join(allowed)}"
            )


def stages_of(graph: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages of a parsed dvc.yaml, in its order."""
    return dict(graph.get("stages") or {})


def check_all(params_file: Path = PARAMS_FILE, graph_file: Path = GRAPH_FILE) -> None:
    """Check the whole file: `seed`, `compute`, the section of every stage in dvc.yaml, those of commands where
    they are there, and nothing else.

    Each stage's class is `Params` in `tasks.STAGE`, each command's in `tasks.registry.COMMAND`. Raises
    ParamsError: one line for each faulty section.
    """
    data = read_yaml(params_file)
    stages = stages_of(read_yaml(graph_file))
    faults: list[str] = []
    for check in (
        lambda: check_sections(data, stages, params_file),
        lambda: read_shared(data, params_file),
        *(_section_check(data, stage, f"tasks.{stage}", params_file) for stage in stages),
        *(
            _section_check(data, command, f"tasks.registry.{command}", params_file)
            for command in COMMANDS
            if command in data
        ),
    ):
        try:
            check()
        except ParamsError as error:
            faults.append(str(error))
    if faults:
        raise ParamsError("\n".join(faults))


def _section_check(data: Mapping[str, Any], name: str, module: str, file: Path) -> Any:
    return lambda: read_section(data, name, importlib.import_module(module).Params, file)


def validate(value: Any, name: str, section: type[AnySection], file: Path = PARAMS_FILE) -> AnySection:
    """`value` as a `section`; `name` is where it stands in the file. Raises ParamsError."""
    if not isinstance(value, dict):
        raise ParamsError(
            f"{file}: {name}: expected keys ({', '.join(section.model_fields)}), found {_shown(value)}"
        )
    try:
        # by way of JSON, where strict types still take a list for a tuple and text for a path
        return section.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise ParamsError(f"{file}: {_explain(error, value, name, section)}") from None


def _explain(error: ValidationError, value: dict[str, Any], name: str, section: type[Section]) -> str:
    faults: dict[str, list[ErrorDetails]] = {}
    # a misspelt key is also a missing one: the misspelling says more
    for fault in sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden"):
        faults.setdefault(_dotted(fault, value, name), []).append(fault)
    key, details = next(iter(faults.items()))
    more = f" (and {len(faults) - 1} more: {', '.join(list(faults)[1:4])})" if len(faults) > 1 else ""
    return f"{key}: {_problem(details, section)}{more}"


def _problem(details: list[ErrorDetails], section: type[Section]) -> str:
    first = details[0]
    if first["type"] == "missing":
        return "missing"
    if first["type"] == "extra_forbidden":
        allowed = _keys_at(first["loc"][:-1], section)
        return f"unknown key{_nearest(str(first['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # keys that do not go together
        return _expected(first)
    found = first["ctx"]["tag"] if first["type"] == "union_tag_invalid" else first["input"]
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    choices = [choice for detail in details for choice in _choices(detail)]
    near = _nearest(found, choices) if isinstance(found, str) else ""
    return f"found {_shown(found)}, expected {expected}{near}{_number_hint(found, expected)}"


def _expected(detail: ErrorDetails) -> str:
    if choices := _choices(detail):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if detail["type"] == "none_required":
        return "null"
    return re.sub(r"^(Input should be|Value error,|Assertion failed,)\s*", "", detail["msg"])


def _choices(detail: ErrorDetails) -> list[str]:
    """The allowed values of a choice; the tags of a union of sections count as such."""
    if detail["type"] == "union_tag_invalid":
        text = str(detail["ctx"]["expected_tags"])
    elif detail["type"] in ("literal_error", "enum"):
        text = str(detail["ctx"]["expected"])
    else:
        return []
    return [quoted or plain for quoted, plain in re.findall(r"'([^']*)'|([^\s',]+)", text) if plain != "or"]


def _number_hint(found: Any, expected: str) -> str:
    """Text that reads as a number was quoted in the file."""
    if not isinstance(found, str) or not re.search(r"number|integer", expected):
        return ""
    try:
        float(found)
    except ValueError:
        return ""
    return "; write it without quotes"


def _dotted(fault: ErrorDetails, value: Any, name: str) -> str:
    """Where in the file the fault is; the steps that pydantic adds for unions are left out."""
    parts = [name] if name else []
    steps: tuple[Any, ...] = fault["loc"][:-1] if fault["type"] == "missing" else fault["loc"]
    for step in steps:
        if isinstance(value, list) or (isinstance(value, dict) and step in value):
            value = value[step]
            parts.append(str(step))
    if fault["type"] == "missing":
        parts.append(str(fault["loc"][-1]))
    return ".".join(parts)


def _keys_at(steps: tuple[int | str, ...], section: type[BaseModel]) -> list[str]:
    """The keys of the section found by following `steps`: names of fields, places in lists, tags of unions."""
    found = [section]
    for step in steps:
        inner = [
            part
            for model in found
            if step in model.model_fields
            for part in _sections_in(model.model_fields[str(step)].annotation)
        ]
        tagged = [model for model in found if step in _literals(model)]
        found = inner or tagged or found
    return list(dict.fromkeys(key for model in found for key in model.model_fields))


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections named anywhere in a type: `tuple[A | B, ...]` has two."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections_in(part)]


def _literals(model: type[BaseModel]) -> set[Any]:
    """The values that the choices of a section allow: one of them is its tag in a union."""
    return {
        value
        for field in model.model_fields.values()
        if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
    }


def _nearest(word: Any, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), [str(choice) for choice in allowed], n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(value: Any) -> str:
    text = redact(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "..."
