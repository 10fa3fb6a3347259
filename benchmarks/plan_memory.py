"""What `lifecycle plan` says a stage needs, against the most memory the stage really takes.

Every fine-tuning method and PPO (an adapter with and without a value function of its own, and full tuning) on
models of about 40 million random parameters, one of each family, on a CPU. Each runs its stage for a few steps
in a process of its own; all prompts are cut at their limit, so that the lengths are those the plan knows.
Memory is the peak of the process less what it holds after the bare imports, as Linux tells it.

    python benchmarks/plan_memory.py [--rows lora ppo_full] [--families t5 llama]

Prints a table and writes benchmarks/results/plan_memory.json; exits with 3 when a ratio leaves the bounds. It
takes some minutes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.metrics.report import markdown
from tasks.stage.files import write_json

RESULT = Path("benchmarks/results/plan_memory.json")
BOUNDS = (0.8, 1.2)  # of the estimate to the measured peak
METHODS = ("full", "lora", "qlora", "prompt_tuning", "prefix_tuning", "ia3", "bitfit")
PPO = {
    "ppo_lora_shared": {"method": "lora", "value": {"trunk": "shared", "source": None}},
    "ppo_lora_separate": {"method": "lora", "value": {"trunk": "separate", "source": None}},
    "ppo_lora_prompts": {"method": "lora", "value": {"trunk": "separate", "source": None}},
    "ppo_full_separate": {"method": "full", "value": {"trunk": "separate", "source": None}},
}
ROWS = (*METHODS, *PPO)
ARCHITECTURES = {
    "t5": {"family": "t5", "d_model": 512, "layers": 6, "heads": 8, "d_ff": 1024},
    "llama": {"family": "llama", "d_model": 512, "layers": 11, "heads": 8, "d_ff": 1536},
}
VOCABULARY, PROMPT, RESPONSE, BATCH, STEPS = 900, 128, 16, 2, 2
EPISODES, ANSWERED, PPO_STEPS = 8, 4, 2


def params(row: str, family: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """The params of a measurement: those of params.yaml (`base`), with few steps and small batches."""
    architecture = {**base["base"]["architecture"], **ARCHITECTURES[family], "vocabulary": VOCABULARY}
    schedule = {**base["finetune"]["schedule"], "epochs": 1, "batch_size": BATCH, "micro_batch_size": None}
    schedule |= {"evaluations": 1, "log_every": 1, "checkpoint_every": STEPS}
    finetune = {**base["finetune"], "method": row if row in METHODS else "full", "schedule": schedule}
    finetune |= {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE, "held_out": BATCH}
    ppo = {
        **base["ppo"],
        "prompts": "all",
        "steps": PPO_STEPS,
        "checkpoint_every": PPO_STEPS,
        **PPO.get(row, {}),
    }
    ppo["rollouts"] = {
        **ppo["rollouts"], "episodes": EPISODES, "answers": 2, "batch_size": ANSWERED,
        "max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE,
    }  # fmt: skip
    ppo["update"] = {**ppo["update"], "epochs": 1, "minibatches": 2, "stop_at_kl": None, "value_warmup": 0}
    ppo["update"]["shuffle"] = "prompts" if row == "ppo_lora_prompts" else "episodes"
    anything = {**ppo["guard"]["limits"], "kl": 1e9, "gold_drop": 1, "toxicity_rise": 1, "distinct_2": 0}
    anything |= {"length_ratio_low": 0, "length_ratio_high": 1e9}  # so that the last state is the best one
    ppo["guard"] = {**ppo["guard"], "every": PPO_STEPS, "prompts": ANSWERED, "limits": anything}
    ppo["objective"] = {**ppo["objective"], "prompts": ANSWERED, "samples": 1}
    preferred = {**ppo["reward"]["preferred"], "source": "models/reward", "batch_size": ANSWERED}
    ppo["reward"] = {"preferred": preferred}
    compute = {**base["compute"], "device": "cpu", "precision": "fp32", "threads": 2}
    changed = {
        "compute": compute,
        "base": {**base["base"], "source": "scratch", "architecture": architecture},
        "finetune": finetune,
        "ppo": ppo,
    }
    return {**base, **changed}


def prepare(family: str, found: Mapping[str, Any], folder: Path) -> None:
    """Write a model with random weights, a reward model on it, and examples that are longer than any limit."""
    import torch

    from tasks.data.records import Example
    from tasks.data.synthetic import documents
    from tasks.lm.architecture import Architecture
    from tasks.lm.classifier import new_classifier, save_classifier
    from tasks.lm.model import save
    from tasks.lm.scratch import build
    from tasks.stage import Compute

    torch.manual_seed(0)
    texts = list(documents(5, 600))
    lm = build(Architecture.model_validate(found["base"]["architecture"]), texts, sentinels=12)
    for name in ("base", "finetune"):
        save(lm, folder / "models" / name)
    compute = Compute.model_validate(found["compute"])
    judge = new_classifier(folder / "models" / "base", compute)
    judge = replace(judge, max_prompt_tokens=PROMPT, max_answer_tokens=RESPONSE)  # as the stage `reward` has it
    save_classifier(judge, folder / "models" / "reward")
    examples = folder / "data" / "examples"
    examples.mkdir(parents=True)
    long = [" ".join(texts[at : at + 3]) for at in range(0, 60, 3)]
    # no answer of PPO is like a held-out reference: all states are as good, and the last one is the best
    unlike = " ".join(["xyzzy"] * RESPONSE)
    for split, rows in (("train", BATCH * STEPS), ("validation", ANSWERED)):
        records = [
            Example(
                id=f"{split}-{row}", task="summarize", instruction="Summarize", group=f"{split}-{row}",
                input=long[row], outputs=(long[row + 1] if split == "train" else unlike,),
            )
            for row in range(rows)
        ]  # fmt: skip
        lines = [record.line() + "\n" for record in records]
        (examples / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def measure(row: str, folder: Path) -> int:
    """The bytes that the stage of `row` takes in this process, at most, beyond the imports."""
    import bitsandbytes  # noqa: F401 - like those below, so that its memory is not counted to the stage
    from transformers.models.auto import modeling_auto  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.t5 import modeling_t5  # noqa: F401

    import tasks.lm.classifier
    import tasks.lm.curves
    import tasks.lm.peft
    import tasks.lm.train
    import tasks.rlhf.assess
    import tasks.rlhf.course
    import tasks.rlhf.report  # noqa: F401
    from tasks import finetune, ppo
    from tasks.stage import Context, NullTrack
    from tasks.stage.determinism import prepare_torch
    from tasks.stage.params import read_section, read_shared, read_yaml

    os.chdir(folder)
    data = read_yaml(Path("params.yaml"))
    shared = read_shared(data)
    prepare_torch(shared.seed, shared.compute)
    work = Path("work", row)
    work.mkdir(parents=True)
    stage = "ppo" if row in PPO else "finetune"
    context = Context(stage, shared.seed, shared.compute, work, NullTrack())
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here on
    before = resident("VmRSS")
    files = [Path("data/examples", f"{split}.jsonl") for split in ("train", "validation")]
    if stage == "ppo":
        read = read_section(data, "ppo", ppo.Params)
        ppo.ppo(read, *files, Path("models/finetune"), work / "model", work / "reports", context)
    else:
        chosen = read_section(data, "finetune", finetune.Params)
        finetune.finetune(chosen, *files, Path("models/base"), work / "model", work / "reports", context)
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since it was last asked to count anew (VmHWM).

    The peak that `getrusage` tells is no good here: a process inherits that of the one that started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{what}:"))
    return int(kilobytes) * 1024


def run(row: str, family: str, folder: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """Measure `row` in a process of its own, and estimate it."""
    write_json(folder / "params.yaml", params(row, family, base))  # JSON is YAML
    command = [sys.executable, str(Path(__file__).resolve()), "--one", row, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    answer = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    measured = int(answer.stdout.splitlines()[-1])
    return compared(row, family, measured, base, folder)


def compared(row: str, family: str, measured: float, base: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The estimate beside a measured peak."""
    from tasks.planning.stages import needs

    need = needs("ppo" if row in PPO else "finetune", params(row, family, base), folder)
    return {
        "measured_mb": round(measured / 1e6, 1),
        "estimated_mb": round(need.memory.total / 1e6, 1),
        "ratio": round(need.memory.total / measured, 3),
        "phase": need.memory.phase,
        "parts_mb": {name: round(size / 1e6, 1) for name, size in need.memory.parts.items()},
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A line for each measurement."""
    header = ["Family", "Tuning", "Measured MB", "Estimated MB", "Ratio"]
    lines = [
        [*name.split("/"), f"{row['measured_mb']:,.0f}", f"{row['estimated_mb']:,.0f}", f"{row['ratio']:.2f}"]
        for name, row in rows.items()
    ]
    return {"header": header, "lines": [[cell.replace("_", " ") for cell in line] for line in lines]}


def main() -> int:
    """Measure the rows one after another; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--families", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument(
        "--estimate", action="store_true", help="estimate anew, beside the peaks that --out has from before"
    )
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(options.one, options.folder))
        return 0
    from tasks.stage.params import PARAMS_FILE, read_yaml

    base = read_yaml(PARAMS_FILE)
    rows: dict[str, Any] = {}
    if options.estimate:
        before = json.loads(options.out.read_text(encoding="utf-8"))
        for name in (f"{family}/{row}" for family in ARCHITECTURES for row in ROWS):
            if name in before["rows"]:
                family, row = name.split("/")
                rows[name] = compared(row, family, before["rows"][name]["measured_mb"] * 1e6, base, Path())
        write_json(options.out, before | {"rows": rows, "table": table(rows)})
    for family in [] if options.estimate else options.families:
        with tempfile.TemporaryDirectory() as temporary:
            prepare(family, params("full", family, base), Path(temporary))
            for row in options.rows:
                print(f"{family} {row} ...", file=sys.stderr, flush=True)
                rows[f"{family}/{row}"] = run(row, family, Path(temporary), base)
                result = {"rows": rows, "bounds": BOUNDS, "table": table(rows), "versions": _versions()}
                write_json(options.out, result)  # after each row: a run that is broken off has shown something
    shown = table(rows)
    print(markdown(shown["header"], shown["lines"]))
    low, high = BOUNDS
    return 0 if all(low <= row["ratio"] <= high for row in rows.values()) else 3


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
