"""What `lifecycle plan` says: memory and compute of the stages, and what would make them fit."""

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from flows import params_file
from tasks.planning import fit, hardware, stages
from tasks.planning.compute import enough_tokens, training_flops
from tasks.planning.memory import Target
from tasks.planning.text import steps_of, tokens_of_text
from tasks.stage.errors import GateRefused, ParamsError, UserError
from tasks.stage.params import PARAMS_FILE, Compute, check_all, read_shared, read_yaml

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
STRATEGIES = {"ddp": "ddp", "fsdp2": "fsdp", "zero2": "zero2", "zero3": "zero3"}  # of compute.accelerate
CLEARLY = 1.25  # times the memory that is there: `lifecycle run` refuses no earlier than that


def bytes_of(text: str) -> float:
    """`16GB`, `24 GiB` or a plain number of bytes. Raises UserError."""
    number = text.strip().upper()
    unit = next((name for name in UNITS if number.endswith(name)), "")
    try:
        found = float(number.removesuffix(unit)) * UNITS.get(unit, 1)
    except ValueError:
        found = 0.0
    if found <= 0:
        raise UserError(f"--memory {text}: expected a size such as 16GB or 24GiB")
    return found


def look(
    root: Path,
    names: Iterable[str] = (),
    size: str | None = None,
    flops: float | None = None,
    devices: int | None = None,
    strategy: str | None = None,
    presets: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """The plan as plain values: the machine, and of each stage its parameters, memory, time and what mends it.

    `size` is the memory of a device, `flops` its operations a second; both are found out when they are not
    given. `devices` and `strategy` are those of `compute` unless they are given. `presets` and `settings` are
    tried on params.yaml, which stays as it is. Raises UserError for a stage without a plan and a model that
    cannot be read, ParamsError for wrong params.
    """
    data = _params(root, presets, settings)
    devices = devices or data["compute"]["processes"]
    strategy = strategy or STRATEGIES.get(data["compute"]["accelerate"] or "ddp", "ddp")
    data["compute"]["processes"] = devices
    chosen = list(names) or [name for name in stages.STAGES if name in data]
    for name in chosen:
        if name not in stages.STAGES:
            raise UserError(f"--stage {name}: no plan for it; there are plans for {', '.join(stages.STAGES)}")
    machine = _machine(read_shared(data).compute, size, flops)
    memory, rate = machine.memory, machine.flops()
    on = Target(gpu=machine.device != "cpu", mixed=machine.precision == "bf16")
    beyond = stages.IMPORTS if machine.device == "cpu" else hardware.CONTEXT

    def need_of(name: str, params: fit.Params) -> tuple[stages.Need, stages.Memory]:
        need = stages.needs(name, params, root, on=on)
        there = need.memory if machine.device == "cpu" else need.memory.without(stages.MAPPED)
        return need, there.of_one(strategy, devices)

    def room_for(name: str, params: fit.Params) -> float:
        return memory * (1 - stages.engine_share(name, params, root)) if on.gpu else memory

    def fits(name: str) -> Callable[[fit.Params], bool]:
        return lambda params: need_of(name, params)[1].total + beyond <= room_for(name, params)

    found = []
    for name in chosen:
        need, needed = need_of(name, data)
        steps = steps_of(name, data, root)
        entry: dict[str, Any] = {
            "stage": name,
            "parameters": need.counts.total,
            "trained": need.counts.trained if name != "evaluate" else 0,
            "phase": needed.phase,
            "bytes": {part: round(room) for part, room in needed.parts.items() if round(room)},
            "bytes_total": round(needed.total),
            "room": round(room_for(name, data)),
            "fits": needed.total + beyond <= room_for(name, data),
            "flops_a_step": need.flops,
            "seconds_a_step": need.flops / (rate * devices),
            "steps": steps,
            "hours": None if steps is None else steps * need.flops / (rate * devices) / 3600,
        }
        if not entry["fits"]:
            entry["mended_by"] = fit.mend(name, data, fits(name), machine.device == "cpu")
        if name == "base":
            entry["text"] = _text(data, root, need.counts.total)
        found.append(entry)
    return {
        "device": machine.device,
        "precision": machine.precision,
        "memory": round(memory),
        "imports": round(beyond),
        "flops": rate,
        "flops_given": flops is not None,
        "devices": devices,
        "strategy": strategy if devices > 1 else None,
        "presets": list(presets),
        "settings": list(settings),
        "stages": found,
    }


def _machine(compute: Compute, size: str | None, flops: float | None) -> hardware.Machine:
    """The machine that is meant: what is given goes before what is found here."""
    memory = None if size is None else bytes_of(size)
    if memory is not None and flops is not None:
        given = hardware.elsewhere(compute, memory, flops)
        if given is not None:
            return given
    try:
        here = hardware.machine(compute)
    except ParamsError as error:
        if compute.device != "cuda":
            raise
        raise ParamsError(f"{error}; both --memory and --flops plan for a GPU elsewhere") from None
    return hardware.Machine(
        here.device,
        here.memory if memory is None else memory,
        here.precision,
        here.flops if flops is None else lambda: flops,
    )


def show(plan: dict[str, Any]) -> None:
    """Print the plan."""
    many = f", {plan['devices']} devices with {plan['strategy']}" if plan["devices"] > 1 else ""
    how = (
        "given"
        if plan["flops_given"]
        else f"{hardware.UTILISATION:.0%} of what a large matrix product reaches here now"
    )
    lines = [
        f"machine: {plan['device']}, {plan['precision']}{many}",
        f"  memory   {_size(plan['memory'])}, of which the libraries take {_size(plan['imports'])}",
        f"  speed    {_operations(plan['flops'])}/s ({how})",
    ]
    for entry in plan["stages"]:
        trained = f", {entry['trained']:,} of them trained" if entry["trained"] else ""
        parts = " + ".join(f"{name} {_size(size)}" for name, size in entry["bytes"].items())
        fits = "fits" if entry["fits"] else "does not fit"
        lines += [
            "",
            f"{entry['stage']}: {entry['parameters']:,} parameters{trained}",
            f"  memory   {_size(entry['bytes_total'])} at most, while {entry['phase']}: {fits}",
            f"           {parts}",
            f"  compute  {_operations(entry['flops_a_step'])} a step; {_time(entry)}",
        ]
        if entry["room"] < plan["memory"]:
            lines.append(f"  engine   vLLM has {_size(plan['memory'] - entry['room'])} of the memory")
        if "text" in entry:
            lines.append(f"  text     {entry['text']['verdict']}")
    sys.stdout.write("\n".join(lines) + "\n")


def refuse(plan: dict[str, Any]) -> None:
    """Raise GateRefused, a line for each stage that does not fit, with the change that would make it fit."""
    lines = [
        f"{entry['stage']} does not fit: it needs {_size(entry['bytes_total'] + plan['imports'])} and there "
        f"are {_size(entry['room'])}; {_remedy(entry['mended_by'], plan['presets'], plan['settings'])}"
        for entry in plan["stages"]
        if not entry["fits"]
    ]
    if lines:
        raise GateRefused("\n".join(lines))


def refuse_what_cannot_fit(root: Path, due: Iterable[str]) -> None:
    """Raise ParamsError when a stage that is due clearly exceeds the memory of this machine.

    Told without torch, from weights and activations alone, for CPUs: what needs little more than there is may
    still run. Models whose config is not in a folder here are not judged.
    """
    data = read_yaml(root / PARAMS_FILE)
    judged = [name for name in stages.STAGES if name in set(due)]
    if not judged or "base" not in data:  # another graph
        return
    device = data["compute"]["device"]
    if device not in ("auto", "cpu") or (device == "auto" and hardware.has_gpu()):
        return
    memory = CLEARLY * psutil.virtual_memory().total

    def need_of(name: str, params: fit.Params) -> float:
        return stages.needs(name, params, root, stages.rough).memory.total + stages.IMPORTS

    def fits(name: str) -> Callable[[fit.Params], bool]:
        return lambda params: need_of(name, params) <= memory / CLEARLY

    lines = []
    for name in judged:
        needed = need_of(name, data) if stages.is_here(name, data, root) else 0.0
        if needed > memory:
            settings = fit.mend(name, data, fits(name), on_cpu=True)
            lines.append(
                f"{name} cannot fit: it needs about {_size(needed)} and there are {_size(memory / CLEARLY)}; "
                f"{_remedy(settings)} (lifecycle plan says more)"
            )
    if lines:
        raise ParamsError("\n".join(lines))


def _text(data: dict[str, Any], root: Path, parameters: int) -> dict[str, Any]:
    """Whether there is text enough for the model (Hoffmann et al. 2022, 2203.15556)."""
    wanted = enough_tokens(parameters)
    learnt = data["base"]["pretraining"]
    text = tokens_of_text(root)
    cost = _operations(training_flops(parameters, wanted))
    verdict = f"{_prefixed(wanted)} tokens would be worth their compute (20 a parameter, as Chinchilla), {cost}"
    if learnt is None:
        return {"wanted": wanted, "there": None, "verdict": "read as it is, not trained here"}
    if text is None:
        return {"wanted": wanted, "there": None, "verdict": f"{verdict}; data/text is not there yet"}
    read = text * learnt["schedule"]["epochs"]
    share = read / wanted
    said = "enough" if share >= 1 else f"{share:.0%} of that"
    return {
        "wanted": wanted,
        "there": round(read),
        "verdict": f"{verdict}; about {_prefixed(read)} are read: {said}",
    }


def _time(entry: dict[str, Any]) -> str:
    seconds = entry["seconds_a_step"]
    step = f"{seconds:.2g} s each" if seconds < 100 else f"{_span(seconds)} each"
    if entry["hours"] is None:
        source = "feedback" if entry["stage"] == "reward" else "prepare"
        return f"{step}; how many depends on the data, which `{source}` has not made yet"
    return f"{step}, {entry['steps']:,} steps: {_span(entry['hours'] * 3600)}"


def _span(seconds: float) -> str:
    if seconds < 1:
        return "under a second"
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _params(root: Path, presets: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """What params.yaml would hold with the presets and settings, checked."""
    data = read_yaml(root / PARAMS_FILE)  # its own message for a broken file says more
    text = (root / PARAMS_FILE).read_text(encoding="utf-8")
    changed, changes = params_file.changed_text(root, text, presets, settings)
    if changes:
        data = YAML(typ="safe", pure=True).load(changed)
    else:
        check_all(root / PARAMS_FILE, root / "dvc.yaml")
    return data


def _options(name: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (name, value)]


def _remedy(mended_by: fit.Settings | None, presets: Sequence[str] = (), settings: Sequence[str] = ()) -> str:
    if mended_by is None:
        return "no change of the params would make it fit: take a smaller model or a larger machine"
    kept = [setting for setting in settings if setting.partition("=")[0] not in mended_by]
    tried = [*_options("--preset", presets), *_options("--set", kept)]
    return f"it would fit with: {shlex.join(['lifecycle', 'run', *tried, *fit.options(mended_by)])}"


def _size(number: float) -> str:
    return f"{_prefixed(number)}B"


def _operations(number: float) -> str:
    return f"{_prefixed(number)}FLOP"


def _prefixed(number: float) -> str:
    """Three digits or so, and the prefix of the unit."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.{1 if number < 100 * factor else 0}f} {prefix}"
    return f"{number / 1e3:.0f} k" if number >= 1e3 else f"{number:.0f} "
