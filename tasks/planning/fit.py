"""Which change of the params would make a stage fit."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Params = Mapping[str, Any]
Settings = dict[str, Any]


def changed(data: Params, settings: Settings) -> dict[str, Any]:
    """The params with some of them set, by dotted names, in a copy."""
    found: dict[str, Any] = copy.deepcopy(dict(data))
    for name, value in settings.items():
        *path, last = name.split(".")
        section = found
        for part in path:
            section = section[part]
        section[last] = value
    return found


def mend(stage: str, data: Params, fits: Callable[[Params], bool], on_cpu: bool) -> Settings | None:
    """The change that makes the stage fit: of one param if that is enough, else of few.

    None where all changes together do not help. `fits` judges whole params. A base in four bits saves nothing
    `on_cpu`, where the file it was read from stays in memory.
    """
    levers: list[list[Settings]] = []
    for lever in map(list, _levers(stage, data, on_cpu)):
        for settings in lever:
            if fits(changed(data, settings)):
                return settings
        levers += [lever] if lever else []
        if fits(changed(data, _merged(each[-1] for each in levers))):
            return _mildest(levers, lambda settings: fits(changed(data, settings)))
    return None


def _mildest(levers: list[list[Settings]], fits: Callable[[Settings], bool]) -> Settings:
    """All levers, which at their strongest are enough, each as mild as the others let it be."""
    chosen = [lever[-1] for lever in levers]
    for at in reversed(range(len(levers))):
        trials = ([*chosen[:at], milder, *chosen[at + 1 :]] for milder in ({}, *levers[at]))
        chosen = next(trial for trial in trials if fits(_merged(trial)))
    return _merged(chosen)


def _merged(settings: Iterable[Settings]) -> Settings:
    return {name: value for each in settings for name, value in each.items()}


def options(settings: Settings) -> list[str]:
    """The options of `lifecycle run` that make the change."""
    shown = {None: "null", True: "true", False: "false"}
    return [
        word
        for name, value in settings.items()
        for word in ("--set", f"{name}={shown[value] if value is None or isinstance(value, bool) else value}")
    ]


def _levers(stage: str, data: Params, on_cpu: bool) -> Iterator[Iterator[Settings]]:
    """What may be changed in a stage, the least loss first; each lever from its mildest setting on."""
    section = data[stage]
    if stage == "evaluate":
        yield ({"evaluate.batch_size": size} for size in _halves(section["batch_size"]))
        yield _shorter(stage, section)
    elif stage == "ppo":
        rollouts, update = section["rollouts"], section["update"]
        size = -(-rollouts["episodes"] // update["minibatches"])
        now = min(update["micro_batch_size"] or size, size)
        yield ({"ppo.update.micro_batch_size": rows} for rows in _halves(now))
        yield ({"ppo.rollouts.batch_size": rows} for rows in _halves(rollouts["batch_size"]))
        if section["value"]["trunk"] == "separate":
            yield iter([{"ppo.value.trunk": "shared", "ppo.value.source": None}])
        if section["method"] == "full":
            yield iter([{"ppo.method": "lora"}])
        whole = (size for size in _halves(rollouts["episodes"]) if size % rollouts["answers"] == 0)
        yield ({"ppo.rollouts.episodes": size} for size in whole)
        yield _shorter("ppo.rollouts", rollouts)
    else:
        where, schedule = stage, section.get("schedule")
        if stage == "base":
            where, schedule = "base.pretraining", (section["pretraining"] or {}).get("schedule")
        if schedule is not None:
            now = schedule["micro_batch_size"] or schedule["batch_size"]
            smaller = (size for size in range(now - 1, 0, -1) if schedule["batch_size"] % size == 0)
            yield ({f"{where}.schedule.micro_batch_size": size} for size in smaller)
        if stage == "base":
            yield ({"base.max_tokens": size} for size in _halves(section["max_tokens"]) if size >= 8)
            return
        if section["method"] not in ("lora", "qlora"):
            yield iter([{f"{stage}.method": "lora"}])
        if stage == "finetune" and section["method"] != "qlora" and not on_cpu:
            yield iter([{"finetune.method": "qlora"}])
        yield _shorter(stage, section)


def _shorter(where: str, section: Params) -> Iterator[Settings]:
    return (
        {f"{where}.max_prompt_tokens": size} for size in _halves(section["max_prompt_tokens"]) if size >= 16
    )


def _halves(number: int) -> Iterator[int]:
    return itertools.takewhile(lambda size: size >= 1, (number >> by for by in range(1, number.bit_length())))
