"""A fault at an exact place in a process that a test starts, whichever process down the tree it is."""

from pathlib import Path

import tasks

KILL = "__import__('os').kill(__import__('os').getpid(), 9)"
FULL = "raise OSError(28, 'No space left on device')"
HOOK = """\
# Runs FAULT_CODE in the namespace of the module FAULT_MODULE, right after it is imported.

import importlib.abc
import importlib.util
import os
import sys


class AtImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != os.environ["FAULT_MODULE"]:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_harm(module):
            execute(module)
            exec(os.environ["FAULT_CODE"], vars(module))

        spec.loader.exec_module = execute_and_harm
        return spec


if os.environ.get("FAULT_MODULE") in sys.modules:
    exec(os.environ["FAULT_CODE"], vars(sys.modules[os.environ["FAULT_MODULE"]]))
elif "FAULT_MODULE" in os.environ:
    sys.meta_path.insert(0, AtImport())
"""
WRAP = """\
def harmed(*arguments, _whole={name}, _calls=[], **options):
    _calls.append(1)
    if len(_calls) == {call}:
        {before}
    result = _whole(*arguments, **options)
    if len(_calls) == {call}:
        {after}
    return result
{name} = harmed
"""


def fault(folder: Path, module: str, code: str) -> dict[str, str]:
    """The environment in which every Python process runs `code` in `module` once it has imported it."""
    hook = folder / "fault" / "sitecustomize.py"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(HOOK)
    return {"PYTHONPATH": str(hook.parent), "FAULT_MODULE": module, "FAULT_CODE": code}


def fault_in_stage(root: Path, module: str, code: str) -> dict[str, str]:
    """As `fault`, for a stage that is started in `root`, forked from a process that has imported much already.

    It finds its code through a package `tasks` that is written there.
    """
    package = root / "tasks" / "__init__.py"
    package.parent.mkdir(exist_ok=True)
    package.write_text(f"__path__.append({str(Path(tasks.__file__).parent)!r})\n{HOOK}")
    return {"FAULT_MODULE": module, "FAULT_CODE": code}


def before(name: str, harm: str, call: int = 1) -> str:
    """Code that does `harm` (a statement) when the function `name` is called for the `call`-th time."""
    return WRAP.format(name=name, before=harm, after="pass", call=call)


def after(name: str, harm: str, call: int = 1) -> str:
    """As `before`, when that call is done."""
    return WRAP.format(name=name, before="pass", after=harm, call=call)
