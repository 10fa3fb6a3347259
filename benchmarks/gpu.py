"""Training on a GPU at the sizes of FLAN-T5-base and Qwen2.5-0.5B: speed in both precisions, and memory.

Fine-tuning and PPO, in full and with LoRA, of models with random weights: 248 and 494 million parameters.
Each runs its stage for a few steps, with prompts and answers cut at their limits, so that the lengths are
those that `lifecycle plan` knows. Speed is that of the median step, the first ones left out; memory is the most
that tensors of this process take on the GPU at once. Two rows run when they are named: `ppo_lora_long`, with
many long answers, and `ppo_lora_vllm`, the same with vLLM sampling them (that of `make vllm`, or of the
interpreter that VLLM_PYTHON names).

    python benchmarks/gpu.py [--rows finetune_lora ppo_lora] [--models qwen2.5-0.5b] [--precisions bf16]
    python benchmarks/gpu.py --rows ppo_lora_long ppo_lora_vllm --models qwen2.5-0.5b --precisions bf16

Prints a table and writes benchmarks/results/gpu.json; exits with 3 when an estimate leaves the bounds. It takes
some minutes, wants a GPU with 40 GB (the two rows: 141 GB), and no hub.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.metrics.report import markdown
from tasks.stage import NullTrack
from tasks.stage.files import write_json
from tasks.stage.params import PARAMS_FILE, read_section, read_shared, read_yaml

RESULT = Path("benchmarks/results/gpu.json")
BASE = Path("models/base")
BOUNDS = (0.8, 1.2)  # of an estimate to the measured peak
CONFIGS: dict[str, dict[str, Any]] = {
    "flan-t5-base": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12,
        "num_heads": 12, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1, "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
}  # fmt: skip
ROWS = ("finetune_full", "finetune_lora", "ppo_full", "ppo_lora", "ppo_lora_prompts")
LONG_ROWS = ("ppo_lora_long", "ppo_lora_vllm")
ENGINE = {"python": os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python"), "memory": 0.3}
PRECISIONS = ("bf16", "fp32")
PROMPT, RESPONSE, VOCABULARY = 512, 48, 900
BATCH, MICRO_BATCH, STEPS = 16, 8, 10
EPISODES, ANSWERS, PPO_STEPS, WATCHED = 32, 2, 3, 8
LONG_RESPONSE, MANY_EPISODES = 256, 128
FIRST_STEPS = 3  # in which a GPU warms up; one of PPO
LORA = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}


class Clock(NullTrack):
    """Hears when a step of fine-tuning is over and how fast one of PPO was."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.speeds: list[float] = []
        self.engine_kl: list[float] = []

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Take the time of a loss, which has come from the GPU, or a speed."""
        if "loss" in values:
            self.ends.append(time.perf_counter())
        if "episodes_per_second" in values:
            self.speeds.append(values["episodes_per_second"])
        if "engine_kl" in values:
            self.engine_kl.append(values["engine_kl"])

    @property
    def speed(self) -> float:
        """Tokens a second of fine-tuning, episodes a second of PPO."""
        if self.speeds:
            return statistics.median(self.speeds[1:])
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return BATCH * (PROMPT + RESPONSE) / statistics.median(seconds[FIRST_STEPS - 1 :])


def params(row: str, precision: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """The params of a measurement: those of params.yaml (`base`), with few steps."""
    stage, method = row.split("_")[:2]
    schedule = {
        **base["finetune"]["schedule"], "epochs": 1, "batch_size": BATCH, "micro_batch_size": MICRO_BATCH,
        "evaluations": 1, "log_every": 1, "checkpoint_every": 10 * STEPS,
    }  # fmt: skip
    finetune = {**base["finetune"], "schedule": schedule, "held_out": WATCHED}
    finetune |= {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE}
    finetune["lora"] = {"learning_rate": base["finetune"]["lora"]["learning_rate"], **LORA}
    ppo = {**base["ppo"], "prompts": "all", "steps": PPO_STEPS, "checkpoint_every": 10 * PPO_STEPS}
    ppo |= {"value": {"trunk": "shared", "source": None}, "lora": {**base["ppo"]["lora"], **LORA, "dropout": 0}}
    episodes, response = (MANY_EPISODES, LONG_RESPONSE) if row in LONG_ROWS else (EPISODES, RESPONSE)
    ppo["rollouts"] = {
        **ppo["rollouts"], "episodes": episodes, "answers": ANSWERS, "batch_size": episodes,
        "max_prompt_tokens": PROMPT, "max_response_tokens": response,
        "engine": ENGINE if row == "ppo_lora_vllm" else None,
    }  # fmt: skip
    ppo["update"] = {
        **ppo["update"], "epochs": 1, "minibatches": 2, "micro_batch_size": MICRO_BATCH, "stop_at_kl": None,
        "value_warmup": 0, "learning_rate": 1e-5,
        "shuffle": "prompts" if row.endswith("prompts") else "episodes",
    }  # fmt: skip
    anything = {**ppo["guard"]["limits"], "kl": 1e9, "gold_drop": 1, "toxicity_rise": 1, "distinct_2": 0}
    anything |= {"length_ratio_low": 0, "length_ratio_high": 1e9}
    ppo["guard"] = {**ppo["guard"], "every": PPO_STEPS, "prompts": WATCHED, "limits": anything}
    ppo["objective"] = {**ppo["objective"], "prompts": WATCHED, "samples": 1}
    ppo["reward"] = {"length": {"kind": "length", "free_words": 0, "weight": 0.01}}
    return {
        **base,
        "compute": {**base["compute"], "device": "cuda", "precision": precision},
        "base": {**base["base"], "source": str(BASE)},
        "finetune": {**finetune, "method": method if stage == "finetune" else "full"},
        "ppo": {**ppo, "method": method if stage == "ppo" else "lora"},
    }


def prepare(model: str, found: Mapping[str, Any], folder: Path) -> None:
    """Write a model with random weights, and examples that are longer than any limit."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    from tasks.data.records import Example
    from tasks.data.synthetic import documents
    from tasks.lm.architecture import Architecture
    from tasks.lm.model import LanguageModel, save
    from tasks.lm.scratch import train_tokenizer, with_random_weights

    torch.manual_seed(0)
    texts = list(documents(5, 1200))
    config = dict(CONFIGS[model])
    family = "t5" if config["model_type"] == "t5" else "llama"
    architecture = {**found["base"]["architecture"], "family": family, "vocabulary": VOCABULARY}
    tokenizer = train_tokenizer(Architecture.model_validate(architecture), texts, sentinels=12)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config |= ids | ({} if family == "t5" else {"bos_token_id": tokenizer.bos_token_id})
    built = with_random_weights(AutoConfig.for_model(config.pop("model_type"), **config))
    built.generation_config = GenerationConfig(
        **ids, **({"decoder_start_token_id": tokenizer.pad_token_id} if family == "t5" else {})
    )
    save(LanguageModel(built, tokenizer), folder / BASE)
    long = [" ".join(texts[at % len(texts)] for at in range(row, row + 16)) for row in range(BATCH * STEPS)]
    for split, rows in (("train", long), ("validation", long[:WATCHED])):
        file = folder / "data" / "examples" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        records = [
            Example(
                id=f"{split}-{row}", task="summarize", instruction="Summarize", group=f"{split}-{row}",
                input=text, outputs=(long[row - 1],),
            )
            for row, text in enumerate(rows)
        ]  # fmt: skip
        file.write_text("".join(record.line() + "\n" for record in records), encoding="utf-8")


def measure(name: str, folder: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """Run the stage of `name` in this process; its speed, and its peaks of memory in bytes."""
    import torch

    from tasks import finetune, ppo
    from tasks.stage import Context
    from tasks.stage.determinism import prepare_torch

    row, precision = name.split("/")
    data = params(row, precision, base)
    shared = read_shared(data)
    prepare_torch(shared.seed, shared.compute)
    clock = Clock()
    files = [folder / "data" / "examples" / f"{split}.jsonl" for split in ("train", "validation")]
    gc.collect()  # what the row before has left
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    left = torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        context = Context(row.split("_")[0], shared.seed, shared.compute, work / "work", clock)
        places = [*files, folder / BASE, work / "model", work / "reports"]
        if row.startswith("ppo"):
            ppo.ppo(read_section(data, "ppo", ppo.Params), *places, context)
        else:
            finetune.finetune(read_section(data, "finetune", finetune.Params), *places, context)
    return {
        "speed": clock.speed,
        "engine_kl": statistics.fmean(clock.engine_kl) if clock.engine_kl else None,
        "allocated": torch.cuda.max_memory_allocated() - left,
        "reserved": torch.cuda.max_memory_reserved() - left,
    }


def run(model: str, names: Sequence[str], folder: Path, base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure rows of a model in a process of their own, and estimate each."""
    command = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder), "--names", *names]
    paths = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as process:
        assert process.stdout is not None
        for name, line in zip(names, process.stdout, strict=True):
            measured = json.loads(line)
            yield {
                "speed": round(measured["speed"], 2),
                "reserved_mb": round(measured["reserved"] / 1e6),
                **({} if measured["engine_kl"] is None else {"engine_kl": round(measured["engine_kl"], 5)}),
                **compared(name, model, measured["allocated"], base),
            }


def compared(name: str, model: str, measured: float, base: Mapping[str, Any]) -> dict[str, Any]:
    """The estimate beside a measured peak: of batches without padding, as all texts are cut at the same limit.

    Before its last step PPO keeps as the best state the one it began with, which has no moments of Adam.
    """
    from tasks.planning.memory import ADAM, FLOAT, Target
    from tasks.planning.stages import MAPPED, Memory, needs

    row, precision = name.split("/")
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / BASE).mkdir(parents=True)
        write_json(Path(root) / BASE / "config.json", CONFIGS[model])
        on = Target(gpu=True, mixed=precision == "bf16", padded=False)
        need = needs(row.split("_")[0], params(row, precision, base), Path(root), on=on)
    first = {"best state": FLOAT / (FLOAT + ADAM)}
    phases = need.memory.without(MAPPED).phases
    memory = Memory(
        {
            phase: {part: size * first.get(part, 1) for part, size in parts.items()}
            for phase, parts in phases.items()
        }
    )
    return {
        "measured_mb": round(measured / 1e6),
        "estimated_mb": round(memory.total / 1e6),
        "ratio": round(memory.total / measured, 3),
        "phase": memory.phase,
        "parts_mb": {part: round(size / 1e6) for part, size in memory.parts.items()},
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A line for each measurement."""
    header = ["Model", "Stage", "Precision", "A second", "Measured MB", "Estimated MB", "Ratio"]
    lines = []
    for name, row in rows.items():
        model, stage, precision = name.split("/")
        speed = (
            f"{row['speed']:,.0f} tokens" if stage.startswith("finetune") else f"{row['speed']:.1f} episodes"
        )
        sizes = [f"{row['measured_mb']:,}", f"{row['estimated_mb']:,}", f"{row['ratio']:.2f}"]
        lines.append([model, stage.replace("_", " "), precision, speed, *sizes])
    return {"header": header, "lines": lines}


def main() -> int:
    """Measure the rows one after another; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS + LONG_ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS), metavar="MODEL")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument(
        "--estimate", action="store_true", help="estimate anew, beside the peaks that --out has from before"
    )
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    base = read_yaml(PARAMS_FILE)
    if options.names:
        for name in options.names:
            print(json.dumps(measure(name, options.folder, base)), flush=True)
        return 0
    rows: dict[str, Any] = {}
    if options.estimate:
        before = json.loads(options.out.read_text(encoding="utf-8"))
        for whole, row in before["rows"].items():
            model, name = whole.split("/", 1)
            rows[whole] = row | compared(name, model, row["measured_mb"] * 1e6, base)
        write_json(options.out, before | {"rows": rows, "table": table(rows)})
    for model in [] if options.estimate else options.models:
        with tempfile.TemporaryDirectory() as temporary:
            prepare(model, base, Path(temporary))
            names = [f"{row}/{precision}" for row in options.rows for precision in options.precisions]
            for name, row in zip(names, run(model, names, Path(temporary), base), strict=True):
                rows[f"{model}/{name}"] = row
                print(f"{model} {name}: {row}", file=sys.stderr, flush=True)
                result = {"rows": rows, "bounds": BOUNDS, "table": table(rows), **_machine()}
                write_json(options.out, result)  # after each row: one that is broken off has shown something
    shown = table(rows)
    print(markdown(shown["header"], shown["lines"]))
    low, high = BOUNDS
    return 0 if all(low <= row["ratio"] <= high for row in rows.values()) else 3


def _machine() -> dict[str, Any]:
    import torch

    names = ("torch", "transformers", "peft", "accelerate")
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": versions | {name: version(name) for name in names},
    }


if __name__ == "__main__":
    sys.exit(main())
