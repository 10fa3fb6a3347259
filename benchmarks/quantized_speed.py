"""How fast a quantised model answers on a CPU, beside the dense one: a model of about 120M random weights.

Ways to run it: `dense` (float32), each scheme opened as anyone would (`AutoModel*.from_pretrained`), and
`int8_kernels` (tasks/compress/kernels.py: the int8 folder run by PyTorch's int8 matrix product). Each way has a
process of its own, so that its peak memory is its own; they take turns.

    python benchmarks/quantized_speed.py [--family t5] [--repeats 3] [--ways dense int8_kernels]

Prints a table and writes benchmarks/results/quantized_speed.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from tasks.compress.formats import save_integers, save_with_bitsandbytes
from tasks.compress.kernels import load_int8
from tasks.compress.schemes import BITS
from tasks.compress.speed import speed
from tasks.lm.model import LanguageModel, attach, load, save
from tasks.lm.train import peak_memory
from tasks.metrics.report import markdown
from tasks.stage import Compute, UserError
from tasks.stage.files import write_json

RESULT = Path("benchmarks/results/quantized_speed.json")
COMPUTE = Compute(device="cpu", precision="fp32", threads=None, processes=1, accelerate=None)
WAYS = ("dense", "int8_kernels", "int8", "int8_dynamic", "nf4")
BATCH_SIZES = (1, 16)
PROMPT_TOKENS = 64
GROUP_SIZE = 64
BAR = 1.0  # int8 kernels must answer at least so many times as fast as the dense model


def random_model(family: str, tokenizer: Path) -> LanguageModel:
    """About 120M weights: T5-base with half of its layers, or a Llama of its width."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    if family == "t5":
        config = T5Config(
            vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=6, num_heads=12,
            feed_forward_proj="gated-silu", decoder_start_token_id=0,
        )  # fmt: skip
        return attach(T5ForConditionalGeneration(config), tokenizer)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, tie_word_embeddings=True,
    )  # fmt: skip
    return attach(LlamaForCausalLM(config), tokenizer)


def write(way: str, lm: LanguageModel, root: Path) -> Path:
    """The folder that a way opens."""
    scheme = "int8" if way == "int8_kernels" else way
    folder = root / scheme
    if folder.is_dir():
        return folder
    if scheme == "dense":
        save(lm, folder)
    elif scheme in BITS:
        save_integers(lm, folder, BITS[scheme], None if scheme == "int8" else GROUP_SIZE)
    else:
        save_with_bitsandbytes(root / "dense", folder, scheme, COMPUTE)  # type: ignore[arg-type]
    return folder


def measure(way: str, folder: Path, new_tokens: int) -> dict[str, Any]:
    """Open and time one way, in this process."""
    start = time.perf_counter()
    lm = load_int8(folder, COMPUTE) if way == "int8_kernels" else load(folder, COMPUTE)
    found: dict[str, Any] = {"seconds_to_open": time.perf_counter() - start}
    prompts = torch.randint(5, 30000, (max(BATCH_SIZES), PROMPT_TOKENS)).tolist()
    for size in BATCH_SIZES:
        timed = speed(lm, prompts, size, new_tokens, repeats=2)
        found[f"tokens_per_second_{size}"] = timed.tokens_per_second
        found[f"first_token_ms_{size}"] = 1000 * timed.first_token_seconds
    found["peak_memory_mb"] = peak_memory(lm.device) / 2**20
    found["resident_mb"] = psutil.Process().memory_info().rss / 2**20
    return found


def in_a_process(way: str, folder: Path, new_tokens: int) -> dict[str, Any]:
    """What `measure` finds in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", way, str(folder)]
    ran = subprocess.run(
        [*command, "--new-tokens", str(new_tokens)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Run all ways in turn, several times; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=("t5", "llama"), default="t5")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tokenizer", type=Path, default=Path("models/base"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]), options.new_tokens)))
        return 0

    ways = list(dict.fromkeys(["dense", *options.ways]))
    with tempfile.TemporaryDirectory() as place:
        try:
            lm = random_model(options.family, options.tokenizer)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        parameters = sum(parameter.numel() for parameter in lm.model.parameters())
        folders = {way: write(way, lm, Path(place)) for way in ways}
        del lm
        sizes = {
            way: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for way, folder in folders.items()
        }
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way in ways:
                runs[way].append(in_a_process(way, folders[way], options.new_tokens))

    def ratios(way: str, size: int) -> list[float]:
        key = f"tokens_per_second_{size}"
        return [mine[key] / dense[key] for mine, dense in zip(runs[way], runs["dense"], strict=True)]

    result: dict[str, Any] = {
        way: {
            **{key: round(statistics.median(run[key] for run in found), 3) for key in found[0]},
            **{
                f"speed_ratio_{size}{end}": round(choose(ratios(way, size)), 3)
                for size in BATCH_SIZES
                for end, choose in (("", statistics.median), ("_min", min), ("_max", max))
            },
            "bytes": sizes[way],
            "bytes_ratio": round(sizes[way] / sizes["dense"], 4),
        }
        for way, found in runs.items()
    }
    columns = {
        "tok/s, 1": "tokens_per_second_1", "tok/s, 16": "tokens_per_second_16",
        "first, 1 (ms)": "first_token_ms_1", "first, 16 (ms)": "first_token_ms_16",
        "x dense, 1": "speed_ratio_1", "x dense, 16": "speed_ratio_16",
        "bytes, of dense": "bytes_ratio", "resident (MB)": "resident_mb", "peak (MB)": "peak_memory_mb",
    }  # fmt: skip
    rows = [(way, *(f"{result[way][key]:.4g}" for key in columns.values())) for way in ways]
    print(markdown(("way", *columns), rows))
    write_json(
        RESULT,
        {
            **result,
            "bar": BAR,
            "family": options.family,
            "parameters": parameters,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": options.new_tokens,
            "repeats": options.repeats,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        },
    )
    if "int8_kernels" not in ways:
        return 0
    reached = [result["int8_kernels"][f"speed_ratio_{size}"] for size in BATCH_SIZES]
    print(f"int8 kernels are {reached[0]}× (one prompt) and {reached[1]}× (16) as fast; bar: {BAR}×")
    return 0 if min(reached) >= BAR else 3


if __name__ == "__main__":
    sys.exit(main())
