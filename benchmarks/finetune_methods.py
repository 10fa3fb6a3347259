"""Every fine-tuning method on the same data and base: what it costs, what it gains, what is forgotten.

Beside the methods stand the base before tuning, tuning on the main task alone, and a negative control: LoRA on
a base of the same shape with random weights. Each trains as `finetune` in params.yaml says, for the same number
of steps, in a process of its own, and answers the same test examples as the stage `evaluate`.

    python benchmarks/finetune_methods.py [--rows full lora] [--steps 100] [--examples 50]

Prints a table and writes benchmarks/results/finetune_methods.json. With all rows and steps it takes about as
many minutes as there are rows on two cores.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.evaluate import Examples, chosen
from tasks.evaluate import Params as EvaluateParams
from tasks.finetune import Params, finetune
from tasks.metrics.report import markdown
from tasks.stage import Compute, Context, NullTrack, UserError
from tasks.stage.determinism import prepare_torch
from tasks.stage.files import write_json
from tasks.stage.memory import peak_memory
from tasks.stage.params import read_section, read_shared, read_yaml

RESULT = Path("benchmarks/results/finetune_methods.json")
PARAMS = Path("params.yaml")
BAR = 0.9  # of full tuning's gain in ROUGE-L, that LoRA must keep


@dataclass(frozen=True)
class Row:
    """A line of the table; no method: the base as it is."""

    method: str | None
    main_task_only: bool = False
    random_base: bool = False


METHODS = ("full", "lora", "qlora", "prompt_tuning", "prefix_tuning", "ia3", "bitfit")
ROWS = {
    "base": Row(None),
    **{method: Row(method) for method in METHODS},
    "full_main_task_only": Row("full", main_task_only=True),
    "lora_main_task_only": Row("lora", main_task_only=True),
    "lora_random_base": Row("lora", random_base=True),
}


class Costs(NullTrack):
    """Keeps what the stage tells the tracking server of time and memory."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            self.found |= values


def measure(row: Row, folder: Path, steps: int | None, count: int) -> dict[str, Any]:
    """Tune as `row` says and score the answers to `count` test examples of each task."""
    from tasks.data.records import read_examples
    from tasks.lm.model import load

    data = read_yaml(folder / PARAMS)
    shared = read_shared(data)
    scoring = read_section(data, "evaluate", EvaluateParams)
    prepare_torch(shared.seed, shared.compute)
    base = _random_base(folder, shared.compute) if row.random_base else folder / "base"
    result: dict[str, Any] = {}
    model = base
    if row.method is not None:
        model = folder / "tuned"
        tasks = [scoring.task] if row.main_task_only else None
        params = read_section(data, "finetune", Params).model_copy(
            update={"method": row.method, "tasks": tasks}
        )
        schedule = params.schedule
        everything = len(read_examples(folder / "examples" / "train.jsonl"))
        wanted = steps or int(everything * schedule.epochs) // schedule.batch_size
        rows = len(read_examples(folder / "examples" / "train.jsonl", tasks))
        epochs = (wanted * schedule.batch_size + 0.5) / rows  # half a row more: rounding loses no step
        params = params.model_copy(update={"schedule": schedule.model_copy(update={"epochs": epochs})})
        result = _tune(params, folder, base, model, shared.seed, shared.compute)
    examples = Examples(main_task=count, other_tasks=count, decoding=1)
    test = chosen(
        read_examples(folder / "examples" / "test.jsonl"), scoring.model_copy(update={"examples": examples})
    )
    lm = load(model, shared.compute)
    return result | {"scores": {task: _scores(lm, asked, scoring) for task, asked in test.items()}}


def _tune(params: Params, folder: Path, base: Path, model: Path, seed: int, compute: Compute) -> dict[str, Any]:
    import tasks.lm.peft
    import tasks.lm.train  # noqa: F401 - so that its memory is not counted to the method

    before = peak_memory() / 2**20
    work = folder / "work"
    work.mkdir(exist_ok=True)
    costs = Costs()
    examples = folder / "examples"
    told = finetune(
        params,
        examples / "train.jsonl",
        examples / "validation.jsonl",
        base,
        model,
        folder / "reports",
        Context("finetune", seed, compute, work, costs),
    )
    kept = ("trainable_parameters", "trainable_share", "weights_bytes", "steps", "loss_before", "loss_after")
    return {name: told[name] for name in kept} | {
        "learning_rate": params.options["learning_rate"],
        "seconds": round(costs.found["seconds"], 1),
        "memory_mb": round(costs.found["peak_memory_mb"] - before, 1),
    }


def _scores(lm: Any, examples: Any, params: EvaluateParams) -> dict[str, float]:
    from tasks.lm.respond import respond
    from tasks.metrics.measures import flat, quality

    answers = respond(
        lm,
        [example.prompt for example in examples],
        params.generation,
        batch_size=params.batch_size,
        seed=0,
        max_prompt_tokens=params.max_prompt_tokens,
    )
    measures = quality(
        answers, [example.outputs for example in examples], [example.slots for example in examples]
    )
    names = ("rougeL", "slot_f1", "exact_match")
    return flat({name: measures[name] for name in names if name in measures}, params.bootstrap_samples, seed=0)


def _random_base(folder: Path, compute: Compute) -> Path:
    """The base with weights drawn anew."""
    from tasks.lm.model import LanguageModel, load, save

    lm = load(folder / "base", compute, trainable=True)
    model = type(lm.model)(lm.model.config)
    model.generation_config = lm.model.generation_config
    save(LanguageModel(model, lm.tokenizer), folder / "random_base")
    return folder / "random_base"


def summary(rows: Mapping[str, Mapping[str, Any]], task: str) -> dict[str, Any]:
    """The share of full tuning's gain in ROUGE-L that LoRA keeps, on the base and on a random one."""
    score = {name: row["scores"][task]["rougeL"] for name, row in rows.items()}
    if not {"base", "full", "lora"} <= set(score):
        return {}
    gain = score["full"] - score["base"]
    found = {"lora_share_of_full_gain": (score["lora"] - score["base"]) / gain}
    if "lora_random_base" in score:
        found["lora_on_random_base_share_of_full_gain"] = (score["lora_random_base"] - score["base"]) / gain
    return {name: round(value, 4) for name, value in found.items()}


def table(rows: Mapping[str, Mapping[str, Any]], main: str) -> dict[str, Any]:
    """One line a row; exact match on the tasks that are not the main one shows what was forgotten."""
    others = [task for task in next(iter(rows.values()))["scores"] if task != main]
    header = ["Tuning", "Trainable", "Weights kB", "Memory MB", "Seconds", "ROUGE-L", "Slot-F1"]
    lines = []
    for name, row in rows.items():
        cost = ["", "", "", ""]
        if "seconds" in row:
            cost = [f"{row['trainable_share']:.2%}", f"{row['weights_bytes'] / 1000:,.0f}"]
            cost += [f"{row['memory_mb']:.0f}", f"{row['seconds']:.0f}"]
        scores = row["scores"]
        numbers = [scores[main]["rougeL"], scores[main].get("slot_f1")]
        numbers += [scores[task]["exact_match"] for task in others]
        lines.append([name.replace("_", " "), *cost, *("" if n is None else f"{n:.3f}" for n in numbers)])
    return {"header": [*header, *(f"{task}, exact" for task in others)], "lines": lines}


def main() -> int:
    """Measure the rows one after another; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--steps", type=int, help="default: as many as params.yaml gives")
    parser.add_argument("--examples", type=int, default=200, help="test examples of each task")
    parser.add_argument("--data", type=Path, default=Path("data/examples"))
    parser.add_argument("--base", type=Path, default=Path("models/base"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.one:
            found = measure(ROWS[options.one], options.folder, options.steps, options.examples)
            write_json(options.folder / "result.json", found)
            return 0
        main_task = read_section(read_yaml(PARAMS), "evaluate", EvaluateParams).task
        return _all(options, main_task)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _all(options: argparse.Namespace, main_task: str) -> int:
    for needed in (options.data, options.base):
        if not needed.is_dir():
            raise UserError(f"{needed} is missing: run the stages prepare and base first")
    rows: dict[str, Any] = {}
    result: dict[str, Any] = {
        "rows": rows,
        "main_task": main_task,
        "bar": BAR,
        "examples": options.examples,
        "cores": os.cpu_count(),
        "versions": _versions(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(
            options.data, folder / "examples"
        )  # a pipeline that runs meanwhile changes nothing here
        shutil.copytree(options.base, folder / "base")
        shutil.copy(PARAMS, folder)
        for name in options.rows:
            print(f"{name} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
            command += ["--examples", str(options.examples)]
            command += ["--steps", str(options.steps)] if options.steps else []
            environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
            code = subprocess.run(command, check=False, env=environment).returncode
            if code:
                return code
            rows[name] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            result |= summary(rows, main_task) | {"table": table(rows, main_task)}
            write_json(options.out, result)  # after each row: a run that is broken off has shown something
    print(markdown(result["table"]["header"], result["table"]["lines"]))
    share = result.get("lora_share_of_full_gain")
    if share is None:
        return 0
    print(f"LoRA keeps {share:.1%} of full tuning's gain in ROUGE-L (bar: {BAR:.0%})")
    return 0 if share >= BAR else 3


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "transformers", "peft")
    }


if __name__ == "__main__":
    sys.exit(main())
