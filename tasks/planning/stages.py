"""What the stages that train or answer with a model need, by the params at hand.

Estimates are for the longest examples that the params allow. On a CPU they are what the process takes beyond
the bare imports; `benchmarks/plan_memory.py` holds them against measured peaks.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.planning import memory
from tasks.planning.compute import forward_flops, passes
from tasks.planning.counts import Counts
from tasks.planning.counts import counts as counted
from tasks.planning.memory import ADAM, CPU, FLOAT, HALF, NF4, Kept, Target
from tasks.planning.models import config_at
from tasks.planning.shape import Shape, config_of, shape_of
from tasks.stage import UserError

Params = Mapping[str, Any]
Count = Callable[[Params, str, Params], Counts]
STAGES = ("base", "finetune", "reward", "ppo", "evaluate")
# Beyond the bare imports: code that is first touched in a run, buffers, tokenizers, figures. And what is kept
# for a backward pass takes more room than its bytes, as it does not fill the gaps that others left. Both are
# one number for all methods, told from the peaks in benchmarks/results/plan_memory.json and ppo_vs_trl.json.
WORKSPACE, GAPS = 60e6, 1.25
# On a CPU weights are read where they lie in the file, so that what was quantised stays in memory too.
MAPPED = "mapped file"
IMPORTS = 450e6  # of a stage, before it does anything


@dataclass(frozen=True)
class Memory:
    """Bytes of each part, in each phase of a stage; the largest phase is what it needs."""

    phases: Mapping[str, Mapping[str, float]]

    @property
    def phase(self) -> str:
        """The name of the largest one."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> Mapping[str, float]:
        """The parts of the largest phase."""
        return self.phases[self.phase]

    @property
    def total(self) -> float:
        """Bytes, at most."""
        return sum(self.parts.values())

    def without(self, part: str) -> "Memory":
        """The same phases without one of the parts."""
        return Memory(
            {
                name: {each: size for each, size in parts.items() if each != part}
                for name, parts in self.phases.items()
            }
        )

    def of_one(self, strategy: str, devices: int) -> "Memory":
        """What one of several devices needs."""
        return Memory({name: memory.sharded(parts, strategy, devices) for name, parts in self.phases.items()})


@dataclass(frozen=True)
class Need:
    """Of one stage: `flops` are of one step (an optimizer step, PPO step, or batch of answers)."""

    stage: str
    counts: Counts
    memory: Memory
    flops: float
    examples: int  # in a step


@lru_cache
def _counted(config: str, method: str, options: str) -> Counts:
    return counted(json.loads(config), method, json.loads(options))


def exact(config: Params, method: str, options: Params) -> Counts:
    """Counts on torch's meta device; the same question is answered once."""
    return _counted(json.dumps(config), method, json.dumps(options))


def rough(config: Params, method: str, options: Params) -> Counts:
    """Counts without torch and without adapters: never more than there are."""
    parameters = _shape(config).parameters
    return Counts(parameters, parameters if method == "full" else 0)


def needs(stage: str, data: Params, root: Path, count: Count = exact, on: Target = CPU) -> Need:
    """What `stage` needs with the checked params `data` where it runs.

    Raises UserError when the model is not here, or of an architecture without formulas.
    """
    needed = {"base": _base, "finetune": _finetune, "reward": _reward, "ppo": _ppo, "evaluate": _evaluate}
    return needed[stage](data, root, count, on)


def is_here(stage: str, data: Params, root: Path) -> bool:
    """Whether the models of a stage can be told without the hub, and there are formulas for them."""
    sources = [data["base"]["source"]]
    if stage == "reward":
        sources.append(data["reward"]["model"]["source"])
    if stage == "ppo":
        sources += [part["source"] for part in data["ppo"]["reward"].values() if part["kind"] == "model"]
    local = all(
        source == "scratch" or source.startswith("models/") or (root / source).is_dir() for source in sources
    )
    return local and shape_of(model_config(data, root)) is not None


def engine_share(stage: str, data: Params, root: Path) -> float:
    """The share of a GPU that another engine has, which answers for the stage; 0 where none does."""
    section = data["ppo"]["rollouts"] if stage == "ppo" else data[stage]
    engine = section.get("engine")
    if engine is None or _shape(model_config(data, root)).is_encoder_decoder:
        return 0.0
    share: float = engine["memory"]
    return share


def model_config(data: Params, root: Path) -> Params:
    """The config.json of the model that the pipeline is about: the base."""
    source = data["base"]["source"]
    if source == "scratch":
        return config_of(data["base"]["architecture"])
    return config_at(source, data["base"]["revision"], root)


def _base(data: Params, root: Path, count: Count, on: Target) -> Need:
    section, config = data["base"], model_config(data, root)
    shape, found = _shape(config), count(config, "full", {})
    learnt, longest = section["pretraining"], section["max_tokens"]
    lengths = (longest, longest) if shape.is_encoder_decoder else (longest // 2, longest // 2)
    if learnt is None:
        weights = {"weights": FLOAT * found.total, "libraries": WORKSPACE}
        reading = {"activations": memory.forward(shape, 32, sum(lengths))}
        return Need(
            "base", found, Memory({"reading": weights | reading}), 32 * forward_flops(shape, *lengths), 32
        )
    keep = memory.kept("full", {})
    return _training(
        "base", shape, found, keep, learnt["schedule"], lengths, on, FLOAT * found.total, _processes(data)
    )


def _finetune(data: Params, root: Path, count: Count, on: Target) -> Need:
    section, config = data["finetune"], model_config(data, root)
    method = section["method"]
    options = _options(section["lora" if method == "qlora" else method])
    shape, found = _shape(config), count(config, method, options)
    lengths = (section["max_prompt_tokens"], section["max_response_tokens"])
    keep, schedule = memory.kept(method, options, on), section["schedule"]
    need = _training(
        "finetune", shape, found, keep, schedule, lengths, on, FLOAT * found.total, _processes(data)
    )
    if method != "qlora":
        return need
    weights = {
        "weights": FLOAT * found.total - (FLOAT - NF4) * shape.linear,
        "unpacked layer": memory.unpacked(shape),
        MAPPED: FLOAT * shape.linear,
    }
    if on.mixed:
        weights[memory.COPIES] = memory.copies(shape, keep) - HALF * shape.linear
    return replace(need, memory=Memory({"training": {**need.memory.parts, **weights}}))


def _reward(data: Params, root: Path, count: Count, on: Target) -> Need:
    section = data["reward"]
    config = _source_config(section["model"]["source"], section["model"]["revision"], data, root)
    shape, method = _shape(config), section["method"]
    options = _options(section[method])
    found = count(config, method, options)
    completions = data["feedback"]["source"].get("completions", 2)
    keep = memory.kept(method, options, on)
    prompt, response = section["max_prompt_tokens"], section["max_response_tokens"]
    windowed = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    # all answers stand side by side in one row, but where attention has a window
    lengths, rows = ((prompt, response), completions) if windowed else ((prompt, completions * response), 1)
    return _training(
        "reward",
        shape,
        found,
        keep,
        section["schedule"],
        lengths,
        on,
        FLOAT * found.total,
        _processes(data),
        rows,
    )


def _training(
    stage: str,
    shape: Shape,
    found: Counts,
    keep: Kept,
    schedule: Params,
    lengths: tuple[int, int],
    on: Target,
    weights: float,
    processes: int,
    sequences: int = 1,
) -> Need:
    """A stage on transformers' Trainer; an example is `sequences` sequences of these lengths."""
    rows = (schedule["micro_batch_size"] or math.ceil(schedule["batch_size"] / processes)) * sequences
    held = _held(shape, keep, rows, lengths, on) + memory.logits(shape, rows, lengths[1], memory.LOGITS_OF_LOSS)
    training = {
        "weights": weights,
        **memory.trained_state(found.trained),
        "activations": held if on.gpu else GAPS * held,
        "libraries": WORKSPACE,
    }
    if on.mixed:
        training[memory.COPIES] = memory.copies(shape, keep)
    each = passes(keep.head) * forward_flops(shape, *lengths) * sequences
    return Need(
        stage, found, Memory({"training": training}), each * schedule["batch_size"], schedule["batch_size"]
    )


def _held(shape: Shape, keep: Kept, rows: int, lengths: tuple[int, int], on: Target) -> float:
    """Bytes of activations, and on a CPU of the room that LoRA leaves between them."""
    found = memory.activations(shape, keep, rows, *lengths, on)
    return found if on.gpu else found + memory.updates(shape, keep, rows, *lengths, on.width)


def _held_of_answers(shape: Shape, keep: Kept, rows: int, section: Params, on: Target) -> float:
    """Bytes of activations of `rows` episodes. A decoder that is given prompts with all their answers reads
    each once, and every answer has a copy of its keys and values.
    """
    rollouts = section["rollouts"]
    prompt, response = rollouts["max_prompt_tokens"], rollouts["max_response_tokens"]
    if shape.is_encoder_decoder or section["update"]["shuffle"] == "episodes":
        return _held(shape, keep, rows, (prompt, response), on)
    prompts = math.ceil(rows / rollouts["answers"])
    found = _held(shape, keep, prompts, (prompt, 0), on) + _held(shape, keep, rows, (0, response), on)
    return found + memory.cache(shape, rows, prompt, 0)


def _ppo(data: Params, root: Path, count: Count, on: Target) -> Need:
    section, config = data["ppo"], model_config(data, root)
    shape, method = replace(_shape(config), dropout=0.0), section["method"]  # it is off
    options = {**section["lora"], "dropout": 0.0} if method == "lora" else {}
    found = count(config, method, options)
    rollouts, update = section["rollouts"], section["update"]
    prompt, response = rollouts["max_prompt_tokens"], rollouts["max_response_tokens"]
    trunks = 2 if section["value"]["trunk"] == "separate" else 1
    trained = trunks * found.trained
    judges = [
        (_shape(_source_config(part["source"], part["revision"], data, root)), part["batch_size"])
        for part in section["reward"].values()
        if part["kind"] == "model"
    ]
    models = {
        "weights": FLOAT * (trunks * found.total + (shape.parameters if method == "full" else 0)),
        "reward models": on.width * sum(judge.parameters for judge, _ in judges),
        **memory.trained_state(trained),
        "libraries": WORKSPACE,
    }
    keep = memory.kept(method, options)
    episodes = math.ceil(rollouts["episodes"] / _processes(data))  # of each process
    size = math.ceil(episodes / update["minibatches"])
    rows = min(update["micro_batch_size"] or size, size)
    single = replace(on, mixed=False)  # PPO's own models compute in float32
    held = trunks * _held_of_answers(shape, keep, rows, section, single)
    held += memory.logits(shape, rows, response, memory.LOGITS_OF_PPO)
    prompts = math.ceil(episodes / rollouts["answers"])
    states = (
        0 if keep.encoder or not shape.is_encoder_decoder else trunks * prompts * prompt * shape.width * FLOAT
    )
    asked = min(rollouts["batch_size"], episodes)
    scored = [
        memory.forward(judge, min(batch, episodes), prompt + response, on.width) for judge, batch in judges
    ]
    reading = memory.forward(shape, asked, prompt)
    reading += memory.logits(shape, asked, response, memory.LOGITS_OF_ANSWERS)
    models["best state"] = (FLOAT + ADAM) * trained
    models["rollouts"] = states
    keys = memory.cache(shape, asked, prompt, response)
    phases = _phases_of_ppo(models, keys, max([reading, *scored]), held, FLOAT * found.total, on)
    once = forward_flops(shape, prompt, response)
    reads = 2 + (trunks - 1) + len(judges) + update["epochs"] * passes(method == "full") * trunks
    return Need("ppo", found, Memory(phases), reads * once * rollouts["episodes"], rollouts["episodes"])


def _phases_of_ppo(
    models: Mapping[str, float], keys: float, reading: float, held: float, copied: float, on: Target
) -> dict[str, dict[str, float]]:
    """What PPO holds from phase to phase, beside what it always holds.

    On a GPU what one phase has freed is there for the next. On a CPU the pieces that answers were made in are
    too small for what comes next, and those of the updates for copies of whole weights.
    """
    kept = {"next best state": models["best state"]}
    written = {"copy to write": copied}
    if on.gpu:
        return {
            "answering": {**models, "KV cache": keys},
            "reading answers": {**models, "activations": reading},
            "updating": {**models, "activations": held},
            "keeping the best state": {**models, **kept},
            "writing the model": {**models, **written},
        }
    answering, updating = {**models, "KV cache": keys}, {"KV cache": keys, "activations": GAPS * held}
    return {
        "answering": {**answering, "activations": reading},
        "updating": {**models, **updating},
        "keeping the best state": {**models, **updating, **kept},
        "writing the model": {**models, **updating, **written},
    }


def _evaluate(data: Params, root: Path, count: Count, on: Target) -> Need:
    section, config = data["evaluate"], model_config(data, root)
    shape, found = _shape(config), count(config, "full", {})
    prompt, rows = section["max_prompt_tokens"], section["batch_size"]
    settings = [section["generation"], *section["decoding"].values()]
    beams = max(each.get("num_beams", 1) for each in settings)
    response = max(each.get("max_new_tokens", 0) for each in settings)
    answering = {
        "weights": on.width * found.total,
        "KV cache": memory.cache(shape, rows * beams, prompt, response, on.width),
        "activations": memory.forward(shape, rows, prompt, on.width)
        + memory.logits(shape, rows * beams, 1, memory.LOGITS_OF_ANSWERS),
        "libraries": WORKSPACE,
    }
    flops = rows * beams * forward_flops(shape, prompt, response)
    return Need("evaluate", found, Memory({"answering": answering}), flops, rows)


def _processes(data: Params) -> int:
    """How many processes share every batch."""
    found: int = data["compute"]["processes"]
    return found


def _source_config(source: str, revision: str | None, data: Params, root: Path) -> Params:
    """The config of a model that a stage names; one that the pipeline is still to make is as the base."""
    if source.startswith("models/") and not (root / source / "config.json").is_file():
        return model_config(data, root)
    config = config_at(source, revision, root)
    return config if shape_of(config) is not None else model_config(data, root)


def _shape(config: Params) -> Shape:
    shape = shape_of(config)
    if shape is None:
        raise UserError(
            f"no formulas for the architecture {config.get('model_type')}; "
            "the plan knows t5, llama, mistral and qwen2"
        )
    return shape


def _options(section: Params) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "learning_rate"}
