"""Write the tables of README.md from metrics/ and benchmarks/results/, so that none of its numbers is typed.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. NAME is one of `TABLES` below, or a stage:
then it is the numbers of metrics/NAME.json, nested ones left out.

    python docs/tables.py            # write
    python docs/tables.py --check    # exit with 3 when README.md and the numbers disagree
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks.metrics.report import (
    alignment_table,
    decoding_table,
    differences_table,
    markdown,
    scores_table,
    splits_table,
    tasks_table,
)
from tasks.stage import DataError, UserError
from tasks.stage.files import write_text

README = Path("README.md")
PLACE = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /table -->", re.DOTALL)


def batched_evaluation_table(result: Mapping[str, Any]) -> str:
    """Prompts per second of both ways of answering."""
    rows = [
        (name.replace("_", " "), f"{result[name]['prompts_per_second']:.1f}", f"{result[name]['seconds']:.1f}")
        for name in ("one_at_a_time", "batched")
    ]
    rows.append(("ratio", f"{result['speed_ratio']:.1f}×", ""))
    return markdown(("Answering", "Prompts/s", "Seconds"), rows)


def parity_table(result: Mapping[str, Any]) -> str:
    """The largest difference of each quantity from TRL's."""
    rows = [
        (name.replace("_", " "), f"{difference:.1e}", f"{result['numbers_compared'][name]:,}")
        for name, difference in result["largest_difference"].items()
    ]
    return markdown(("Quantity", "Largest difference", "Numbers"), rows)


def printed_table(result: Mapping[str, Any]) -> str:
    """The table that the benchmark printed."""
    return markdown(result["table"]["header"], result["table"]["lines"])


def guard_table(result: Mapping[str, Any]) -> str:
    """How often the guard spoke where it should, and where it should not."""
    lead = result["median_lead_steps"]
    rows = [
        ("runs on a reward that can be cheated", str(result["cheated_runs"])),
        ("of these, gold score lost", str(result["gold_lost"])),
        ("of these, the guard spoke", str(result["detected"])),
        ("of these, before the loss or at the same look", str(result["spoke_in_time"])),
        ("steps it was ahead, median", "–" if lead is None else f"{lead:g}"),
        ("runs on the reward of `params.yaml`", str(result["honest_runs"])),
        ("of these, the guard spoke", str(result["false_alarms"])),
    ]
    return markdown(("Guard", "Count"), rows)


def _with_interval(metrics: Mapping[str, Any], name: str) -> str:
    return f"{metrics[name]:.3f} [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"


def reward_table(metrics: Mapping[str, Any]) -> str:
    """How often the reward model, and each control, tells the preferred completion."""
    who = {
        "accuracy": "reward model",
        "accuracy_shuffled": "the same, trained on shuffled labels",
        "accuracy_bag_of_words": "words alone",
        "accuracy_length_only": "length alone",
    }
    rows = [(label, _with_interval(metrics, name)) for name, label in who.items()]
    rows.append(("always right, but for the flipped labels", f"{metrics['accuracy_ceiling']:.3f}"))
    return markdown(("Who tells the preferred one", "Accuracy"), rows)


def reward_kinds_table(metrics: Mapping[str, Any]) -> str:
    """Accuracy by what the other completion is."""
    return markdown(
        ("The other completion", "Accuracy"),
        [(kind.replace("_", " "), f"{value:.3f}") for kind, value in metrics["accuracy_by_kind"].items()],
    )


def objective_table(metrics: Mapping[str, Any]) -> str:
    """PPO's objective before and after, beside the best possible."""
    return markdown(
        ("Held-out prompts", "Value"),
        [
            ("reward before", f"{metrics['reward_before']:.3f}"),
            ("reward after", f"{metrics['reward_after']:.3f}"),
            ("KL to the reference (nats a response)", f"{metrics['kl']:.3f}"),
            ("objective before", _with_interval(metrics, "objective_before")),
            ("objective after", _with_interval(metrics, "objective")),
            ("the best possible, in closed form", _with_interval(metrics, "objective_optimum")),
            ("share of the possible gain", _with_interval(metrics, "share_of_gain")),
            ("guard events", str(metrics["guard_events"])),
        ],
    )


SCORES = {"rougeL": "ROUGE-L", "slot_f1": "Slot-F1", "toxicity_rate": "Toxic answers"}


def _scores_of(metrics: Mapping[str, Any], rows: Mapping[str, str]) -> str:
    """Scores of several models in one flat file, told apart by the ends of their names."""
    lines = [
        (label, *(f"{metrics[score + end]:.3f}" for score in SCORES))
        for end, label in rows.items()
        if f"rougeL{end}" in metrics
    ]
    return markdown(("Model", *SCORES.values()), lines)


def variants_speed_table(result: Mapping[str, Any]) -> str:
    """Tokens a second of each model, and how many times as many as the dense one gives."""
    variants = result["variants"]
    sizes = sorted(variants["dense"], key=int)
    rows = [
        (name, *(f"{found[size]['tokens_per_second']:,.0f} ({found[size]['ratio']:.2f}×)" for size in sizes))
        for name, found in sorted(variants.items(), key=lambda entry: entry[0] != "dense")
    ]
    return markdown(("Tokens a second", *(f"batch {size}" for size in sizes)), rows)


def quantized_speed_table(result: Mapping[str, Any]) -> str:
    """Tokens a second and the first token's latency of each way to run the model, alone and sixteen at once."""
    rows = [
        (
            way.replace("_", " "),
            *(
                f"{found[f'tokens_per_second_{size}']:,.0f} ({found[f'speed_ratio_{size}']:.2f}×)"
                for size in (1, 16)
            ),
            *(f"{found[f'first_token_ms_{size}']:,.0f}" for size in (1, 16)),
            f"{found['bytes'] / 1e6:,.0f}",
            f"{found['peak_memory_mb']:,.0f}",
        )
        for way, found in result.items()
        if isinstance(found, Mapping) and "tokens_per_second_1" in found
    ]
    sizes = ("Tokens a second", "batch 16", "First token, ms", "batch 16", "File, MB", "Peak memory, MB")
    return markdown(("Way", *sizes), sorted(rows, key=lambda row: row[0] != "dense"))


def serve_load_table(result: Mapping[str, Any]) -> str:
    """What a served model stood."""
    rows = [
        ("requests", f"{result['requests']:,}"),
        ("a second", f"{result['requests_per_second']:.1f}"),
        *((f"latency, {name} (ms)", f"{result[f'{name}_ms']:,.0f}") for name in ("p50", "p95", "p99")),
        ("lost", str(result["lost"])),
        ("wrong", str(result["wrong"])),
        ("growth of memory", f"{result['memory_growth']:+.1%}"),
    ]
    return markdown(("Served", "Value"), rows)


def distill_table(metrics: Mapping[str, Any]) -> str:
    """The student beside its teacher and the two controls."""
    return _scores_of(
        metrics,
        {
            "_teacher": f"teacher, {metrics['parameters_teacher']:,} parameters",
            "": f"student, {metrics['parameters']:,} parameters",
            "_taught": "student of few examples, with the teacher",
            "_untaught": "student of few examples, from references alone",
        },
    )


def prune_table(metrics: Mapping[str, Any]) -> str:
    """The model before, with weights taken away, and tuned afterwards."""
    return _scores_of(metrics, {"_dense": "dense", "_before_recovery": "pruned", "": "pruned and tuned"})


def quantize_table(metrics: Mapping[str, Any]) -> str:
    """Every scheme that was compared."""
    rows = [
        (
            name.replace("_", " "),
            f"{found['bytes']:,}",
            f"{found['bytes_ratio']:.3f}",
            *(f"{found[score]:.3f}" for score in ("perplexity", *SCORES)),
        )
        for name, found in metrics["schemes"].items()
    ]
    return markdown(("Scheme", "Bytes", "Of the dense", "Perplexity", *SCORES.values()), rows)


EVALUATE = Path("metrics/evaluate.json")
TABLES: dict[str, tuple[Path, Callable[[Mapping[str, Any]], str]]] = {
    "evaluate": (EVALUATE, scores_table),
    "differences": (EVALUATE, differences_table),
    "tasks": (EVALUATE, tasks_table),
    "decoding": (EVALUATE, decoding_table),
    "splits": (EVALUATE, splits_table),
    "alignment": (EVALUATE, alignment_table),
    "reward": (Path("metrics/reward.json"), reward_table),
    "reward_kinds": (Path("metrics/reward.json"), reward_kinds_table),
    "objective": (Path("metrics/ppo.json"), objective_table),
    "distill": (Path("metrics/distill.json"), distill_table),
    "prune": (Path("metrics/prune.json"), prune_table),
    "quantize": (Path("metrics/quantize.json"), quantize_table),
    "batched_evaluation": (Path("benchmarks/results/batched_evaluation.json"), batched_evaluation_table),
    "variants_speed": (Path("benchmarks/results/variants_speed.json"), variants_speed_table),
    "quantized_speed": (Path("benchmarks/results/quantized_speed.json"), quantized_speed_table),
    "serve_load": (Path("benchmarks/results/serve_load.json"), serve_load_table),
    "parity_trl": (Path("benchmarks/results/parity_trl.json"), parity_table),
    "finetune_methods": (Path("benchmarks/results/finetune_methods.json"), printed_table),
    "ppo_vs_trl": (Path("benchmarks/results/ppo_vs_trl.json"), printed_table),
    "guard": (Path("benchmarks/results/guard.json"), guard_table),
    "plan_memory": (Path("benchmarks/results/plan_memory.json"), printed_table),
    "gpu": (Path("benchmarks/results/gpu.json"), printed_table),
}


def main() -> int:
    """Write or check README.md in the current folder; return the exit code."""
    parser = argparse.ArgumentParser(description="Write README.md's tables from the metrics.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 3 when a table is stale"
    )
    check = parser.parse_args().check
    try:
        text = README.read_text(encoding="utf-8")
        names = [place["name"] for place in PLACE.finditer(text)]
        stale = [
            name for name, place in zip(names, PLACE.finditer(text), strict=True) if place["body"] != body(name)
        ]
    except FileNotFoundError as error:
        return _say(f"{error.filename} is missing: run this in the repository's root, after the pipeline", 2)
    except UserError as error:
        return _say(str(error), 2)
    if check and stale:
        return _say(f"README.md and the numbers disagree ({', '.join(stale)}): run python docs/tables.py", 3)
    if stale:
        write_text(README, PLACE.sub(_filled, text))
    return _say(f"README.md: {len(names)} tables, {0 if check else len(stale)} rewritten", 0)


def body(name: str) -> str:
    """Return what stands between the markers of the table `name`.

    Raises DataError when there is no such table.
    """
    if name in TABLES:
        file, table = TABLES[name]
        return table(json.loads(file.read_text(encoding="utf-8"))) + "\n"
    file = Path("metrics") / f"{name}.json"
    if not file.is_file():
        raise DataError(f"README.md: no table {name}: neither one of {', '.join(TABLES)} nor {file}")
    return flat_table(json.loads(file.read_text(encoding="utf-8"))) + "\n"


def flat_table(metrics: Mapping[str, Any]) -> str:
    """The numbers of a flat metrics file, one a line; nested parts are left out."""
    rows = [(key, _shown(value)) for key, value in metrics.items() if not isinstance(value, dict | list)]
    return markdown(("Metric", "Value"), rows)


def _filled(place: re.Match[str]) -> str:
    return f"<!-- table: {place['name']} -->\n{body(place['name'])}<!-- /table -->"


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _say(text: str, code: int) -> int:
    sys.stderr.write(text + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
