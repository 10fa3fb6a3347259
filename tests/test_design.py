"""The rules that keep the system simple, held against the code: names, dependencies, direction of imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tasks.stage.params import COMMANDS

ROOT = Path(__file__).parents[1]
EQUATIONS = {  # of packages of tasks
    "rlhf": {"masked", "rewards", "advantages", "losses", "optimum", "guard"},
    "compress": {"distillation", "low_rank", "pruning"},
}
# no stage needs them, so a change makes none run again
FOR_COMMANDS = ("tasks.registry", "tasks.labels", "tasks.playground", "tasks.scoring", "tasks.planning")
SHARED_PARAMS = ["seed", "compute"]
HEAVY = [
    "torch", "transformers", "mlflow", "matplotlib", "prefect", "dvc", "datasets", "pandas", "peft", "trl",
    "gradio", "ray",
]  # fmt: skip


def stages(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    return found


def paths(entries: list[Any]) -> list[str]:
    """DVC writes a path, or a mapping from it to options."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def modules(folder: str, root: Path = ROOT) -> list[Path]:
    return sorted(path.relative_to(root) for path in (root / folder).rglob("*.py"))


def imports(path: Path, root: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, in functions too; `from a import b` gives `a` and `a.b`."""
    package = path.parent.parts
    for node in _run_nodes(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, which are never run."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from _run_nodes(child)


def imported_files(path: Path, root: Path) -> set[Path]:
    """The first-party files that importing `path` runs, directly: modules, and the packages they lie in."""
    found: set[Path] = set()
    for name in imports(path, root):
        parts = name.split(".")
        if not (root / parts[0]).is_dir():
            continue
        packages = [Path(*parts[:end], "__init__.py") for end in range(1, len(parts) + 1)]
        found |= {
            candidate for candidate in (*packages, Path(*parts).with_suffix(".py")) if is_code(candidate, root)
        }
    return found - {path}


@cache
def is_code(path: Path, root: Path) -> bool:
    """Whether the file exists and holds more than a docstring."""
    if not (root / path).is_file():
        return False
    body = ast.parse((root / path).read_text(encoding="utf-8")).body
    return any(not isinstance(node, ast.Expr) for node in body)


def closure(path: Path, root: Path) -> set[Path]:
    """`path` and every first-party file that running it may import."""
    found: set[Path] = set()
    open_ends = {path}
    while open_ends:
        found |= open_ends
        open_ends = {new for each in open_ends for new in imported_files(each, root)} - found
    return found


def listed_code(stage: dict[str, Any], root: Path) -> set[Path]:
    """The code among a stage's deps; a folder stands for all the code in it."""
    found: set[Path] = set()
    for entry in paths(stage["deps"]):
        if entry.endswith(".py"):
            found.add(Path(entry))
        elif (root / entry).is_dir():
            found |= {path for path in modules(entry, root) if is_code(path, root)}
    return found


def test_a_stage_has_one_name_in_all_places() -> None:
    for name, stage in stages().items():
        assert stage["cmd"] == f"python -m tasks.{name}"
        assert f"metrics/{name}.json" in paths(stage["metrics"])
        assert (ROOT / "tests" / f"test_{name}.py").is_file()
        assert set(stage["params"]) <= {*SHARED_PARAMS, name}
        assert run_names(ROOT / "tasks" / f"{name}.py") == [name]


def run_names(module: Path) -> list[str]:
    """The names under which a stage's module runs: that of its MLflow run, and of its metrics."""
    return [
        node.args[0].value
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "run_stage"
        and isinstance(node.args[0], ast.Constant)
    ]


def test_every_module_of_tasks_is_a_stage_and_every_section_of_the_params_too() -> None:
    found = set(stages())
    assert {path.stem for path in (ROOT / "tasks").glob("*.py")} - {"__init__"} == found
    sections = set(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert sections == {*SHARED_PARAMS, *found, *COMMANDS}


def test_a_command_with_a_section_has_one_name_in_all_places() -> None:
    for command in COMMANDS:
        for path in (f"flows/{command}.py", f"tasks/registry/{command}.py", f"tests/test_{command}.py"):
            assert (ROOT / path).is_file()


def test_a_stage_depends_on_exactly_the_code_it_imports() -> None:
    missing, superfluous = {}, {}
    for name, stage in stages().items():
        expected, listed = closure(Path("tasks", f"{name}.py"), ROOT), listed_code(stage, ROOT)
        missing[name] = sorted(map(str, expected - listed))
        superfluous[name] = sorted(map(str, listed - expected))
    assert not any(missing.values()), f"a change of these leaves the stage stale: {missing}"
    assert not any(superfluous.values()), f"a change of these runs the stage for nothing: {superfluous}"


def test_imports_run_one_way() -> None:
    wrong = []
    stage_names = {f"tasks.{path.stem}" for path in (ROOT / "tasks").glob("*.py")} - {"tasks.__init__"}
    for path in [*modules("flows"), *modules("tasks")]:
        names = set(imports(path, ROOT))
        tops = {name.partition(".")[0] for name in names}
        in_flows = path.parts[0] == "flows"
        if "prefect" in tops and not in_flows:
            wrong.append(f"{path} imports prefect")
        in_registry = path.parts[:2] == ("tasks", "registry")
        in_playground = path.parts[:2] == ("tasks", "playground")
        asks_models = path.parts[:2] in {("tasks", "playground"), ("tasks", "scoring")}
        for_commands = ".".join(path.parts[:2]) in FOR_COMMANDS
        if "mlflow" in tops and path != Path("tasks/stage/tracking.py") and not in_registry:
            wrong.append(f"{path} imports mlflow")
        if not in_flows and not for_commands and any(name.startswith(FOR_COMMANDS) for name in names):
            wrong.append(f"{path} imports what commands alone need")
        if "gradio" in tops and not in_flows and not in_playground:
            wrong.append(f"{path} imports gradio")
        if "flows" in tops and not in_flows:
            wrong.append(f"{path} imports flows")
        # these ask models as the evaluation does, with its params, examples and worked prompts
        if stage := names & stage_names - ({"tasks.evaluate"} if asks_models else set()):
            wrong.append(f"{path} imports a stage: {stage}")
        if in_flows:
            others = {
                name
                for name in names
                if name.startswith("tasks.") and not name.startswith(("tasks.stage", *FOR_COMMANDS))
            }
            wrong += [f"{path} imports {name}" for name in others]
        if path.stem in EQUATIONS.get(path.parts[1], ()):
            package = f"tasks.{path.parts[1]}"
            others = {name for name in names if name.startswith("tasks.") and not name.startswith(package)}
            wrong += [f"{path} imports {name}" for name in others]
    assert wrong == []


def test_no_module_is_named_for_having_no_idea() -> None:
    nameless = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [
        path for path in [*modules("flows"), *modules("tasks")] if nameless & {path.stem, *path.parts}
    ] == []


def test_importing_a_stage_or_the_command_is_light() -> None:
    names = [f"tasks.{path.stem}" for path in (ROOT / "tasks").glob("*.py") if path.stem != "__init__"]
    imported = ", ".join([*names, "flows.cli"])
    code = f"import sys, {imported}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_imported_is_found_wherever_it_is_imported(tmp_path: Path) -> None:
    """The rule above holds only as far as this does."""
    files = {
        "tasks/__init__.py": '"""Nothing."""',
        "tasks/one.py": "from tasks.shared import deep\ndef f():\n    import tasks.late\n",
        "tasks/late.py": "from . import beside\nimport json\n",
        "tasks/beside.py": "if TYPE_CHECKING:\n    import tasks.typing_only\n",
        "tasks/typing_only.py": "x = 1",
        "tasks/unused.py": "x = 1",
        "tasks/shared/__init__.py": "from tasks.shared.base import x",
        "tasks/shared/base.py": "x = 1",
        "tasks/shared/deep.py": "def f(): ...",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = closure(Path("tasks/one.py"), tmp_path)
    assert {path.as_posix() for path in found} == {
        "tasks/one.py", "tasks/late.py", "tasks/beside.py", "tasks/shared/__init__.py", "tasks/shared/base.py",
        "tasks/shared/deep.py",
    }  # fmt: skip
    everything = listed_code({"deps": ["tasks/one.py", {"tasks/shared": {}}, "data/x.json"]}, tmp_path)
    assert {path.as_posix() for path in everything} == {
        "tasks/one.py", "tasks/shared/__init__.py", "tasks/shared/base.py", "tasks/shared/deep.py",
    }  # fmt: skip


def test_models_bring_no_code_and_no_pickles() -> None:
    without_weights = {"AutoConfig", "AutoTokenizer"}
    for path in (*modules("flows"), *modules("tasks")):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert not {"pickle", "joblib", "cloudpickle", "dill"} & set(imports(path, ROOT)), path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, options = (
                ast.unparse(call.func),
                {word.arg: ast.unparse(word.value) for word in call.keywords},
            )
            assert name != "torch.load", path
            assert "allow_pickle" not in options, path
            if (
                name.endswith(".from_pretrained") and name != "PeftConfig.from_pretrained"
            ):  # that one is plain JSON
                assert options["trust_remote_code"] == "False", path
                opened_safely = options.get("use_safetensors") == "True"
                assert opened_safely or name.partition(".")[0] in without_weights, path
