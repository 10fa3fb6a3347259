"""How fast the smaller models answer, beside the model that they were made from: in turn, in one process.

Every model answers the same test prompts with the same number of tokens, greedily. A ratio is of two
answers given one right after the other, so that whatever else the machine does bears on both.

    python benchmarks/variants_speed.py [--dense models/ppo] [--variants distill prune quantize] [--rounds 7]

Prints a table and writes benchmarks/results/variants_speed.json.
"""

import argparse
import os
import platform
import statistics
import sys
from pathlib import Path

import torch
import transformers

from tasks.compress.speed import speed
from tasks.data.records import read_examples
from tasks.lm.collate import encode_prompts
from tasks.lm.model import load
from tasks.metrics.report import markdown
from tasks.stage import Compute, UserError
from tasks.stage.files import write_json

RESULT = Path("benchmarks/results/variants_speed.json")
BATCH_SIZES = (1, 16, 64, 128)
NEW_TOKENS = 24  # about as long as a summary
BAR = 1.7  # the distilled student must be at least so many times as fast as its teacher, in batches


def main() -> int:
    """Let all models answer in turn; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dense", type=Path, default=Path("models/ppo"))
    parser.add_argument("--variants", nargs="+", default=["distill", "prune", "quantize"])
    parser.add_argument("--examples", type=Path, default=Path("data/examples/test.jsonl"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    folders = {"dense": options.dense} | {name: Path("models") / name for name in options.variants}
    try:
        compute = Compute(device="auto", precision="auto", threads=None, processes=1, accelerate=None)
        models = {name: load(folder, compute) for name, folder in folders.items()}
        examples = read_examples(options.examples, ["summarize"])[: max(BATCH_SIZES)]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    prompts = encode_prompts(models["dense"], [example.prompt for example in examples])

    found: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for size in BATCH_SIZES:
        for _ in range(options.rounds):
            for name, lm in models.items():
                rate = speed(lm, prompts, size, NEW_TOKENS, 1).tokens_per_second
                found[name].setdefault(str(size), []).append(rate)
    result = {
        name: {
            size: {
                "tokens_per_second": round(statistics.median(rates), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
            }
            for size, rates in by_size.items()
            if (ratios := [ours / dense for ours, dense in zip(rates, found["dense"][size], strict=True)])
        }
        for name, by_size in found.items()
    }
    about = {
        "new_tokens": NEW_TOKENS,
        "rounds": options.rounds,
        "parameters": {
            name: sum(each.numel() for each in lm.model.parameters()) for name, lm in models.items()
        },
        "device": str(models["dense"].device),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_json(RESULT, {"variants": result, "about": about, "bar": BAR})
    rows = [
        (name, *(f"{each['tokens_per_second']:.0f} ({each['ratio']:.2f}x)" for each in by_size.values()))
        for name, by_size in result.items()
    ]
    print(markdown(("Tokens a second", *(f"batch {size}" for size in BATCH_SIZES)), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
