"""Batched evaluation against answering one prompt at a time, as course notebooks do, on the same model.

The loop tokenizes a prompt, calls `model.generate`, decodes, and goes on to the next. The stage answers prompts
in batches of similar length. Both decode greedily with the same limit; the answers are compared too.

    python benchmarks/batched_evaluation.py [--model models/finetune] [--prompts 128] [--repeats 3]

Prints a table and writes benchmarks/results/batched_evaluation.json.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

from tasks.data.records import read_examples
from tasks.lm.collate import encode_prompts
from tasks.lm.model import LanguageModel, load
from tasks.lm.respond import respond
from tasks.metrics.report import markdown
from tasks.stage import Compute, UserError
from tasks.stage.files import write_json

RESULT = Path("benchmarks/results/batched_evaluation.json")
GENERATION = {"do_sample": False, "num_beams": 1, "max_new_tokens": 40}
BATCH_SIZE = 64
BAR = 5.0  # the batched way must be at least so many times as fast


def one_at_a_time(lm: LanguageModel, prompts: list[str]) -> list[str]:
    """Answer each prompt with a call of its own."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor(encode_prompts(lm, [prompt]))
        with torch.inference_mode():
            found = lm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GENERATION)[0]
        answer = found if lm.is_encoder_decoder else found[ids.shape[1] :]
        answers.append(lm.tokenizer.decode(answer, skip_special_tokens=True).strip())
    return answers


def batched(lm: LanguageModel, prompts: list[str]) -> list[str]:
    """Answer all prompts as the stage does."""
    return respond(lm, prompts, GENERATION, batch_size=BATCH_SIZE, seed=0)


def main() -> int:
    """Run both ways in turn, several times; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/finetune"))
    parser.add_argument("--examples", type=Path, default=Path("data/examples/test.jsonl"))
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    try:
        lm = load(
            options.model, Compute(device="auto", precision="auto", threads=None, processes=1, accelerate=None)
        )
        prompts = [example.prompt for example in read_examples(options.examples, ["summarize"])][
            : options.prompts
        ]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    batched(lm, prompts[:8])  # the first call loads code that neither way should pay for

    seconds: dict[str, list[float]] = {"one_at_a_time": [], "batched": []}
    answers: dict[str, list[str]] = {}
    for _ in range(options.repeats):
        for way in (one_at_a_time, batched):
            start = time.perf_counter()
            answers[way.__name__] = way(lm, prompts)
            seconds[way.__name__].append(time.perf_counter() - start)

    ratios = [slow / quick for slow, quick in zip(*seconds.values(), strict=True)]
    agreeing = sum(one == other for one, other in zip(*answers.values(), strict=True))
    result = {
        **{
            way: {
                "seconds": round(statistics.median(taken), 3),
                "seconds_all": [round(one, 3) for one in taken],
                "prompts_per_second": round(len(prompts) / statistics.median(taken), 2),
            }
            for way, taken in seconds.items()
        },
        "speed_ratio": round(statistics.median(ratios), 2),
        "speed_ratio_min": round(min(ratios), 2),
        "speed_ratio_max": round(max(ratios), 2),
        "same_answers": round(agreeing / len(prompts), 4),
        "bar": BAR,
        "prompts": len(prompts),
        "batch_size": BATCH_SIZE,
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
        "cores": os.cpu_count(),
        "device": lm.device.type,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_json(RESULT, result)
    rows = [
        (way, f"{len(prompts) / statistics.median(taken):.1f}", f"{statistics.median(taken):.2f}")
        for way, taken in seconds.items()
    ]
    print(markdown(("answering", "prompts/s", "seconds"), rows))
    print(
        f"batched is {result['speed_ratio']}× as fast (bar: {BAR}×); "
        f"{agreeing} of {len(prompts)} answers are the same"
    )
    return 0 if statistics.median(ratios) >= BAR else 3


if __name__ == "__main__":
    sys.exit(main())
