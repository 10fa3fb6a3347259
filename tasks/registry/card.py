"""The model card of a registered version, as Markdown."""

from collections.abc import Mapping
from typing import Any

from tasks.metrics.report import scores_table, tasks_table
from tasks.registry.register import Licences

SHOWN = ("data/", "models/")  # outputs whose hashes are on the card


def card(
    name: str,
    lineage: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    settings: Mapping[str, Any],
    licences: Licences,
) -> str:
    """What the model is, how it scores beside the others and the baselines, its terms, where it comes from."""
    about, variant = evaluation["about"], lineage["variant"]
    dirty = " with uncommitted changes" if lineage["dirty"] else ""
    hashes = [f"- `{path}` {digest}" for path, digest in lineage["outputs"].items() if path.startswith(SHOWN)]
    parts = [
        f"# {name}: {variant}",
        f"The variant `{variant}`, made by the stage `{lineage['stage']}`. It answers prompts; its main task "
        f"is `{about['task']}`.",
        "## Scores on the main task",
        f"{about['examples']} test examples, 95 % bootstrap intervals in brackets.",
        scores_table(evaluation),
        "## Scores on every task",
        tasks_table(evaluation),
        "## Use",
        f"A request that names no generation settings gets those of the evaluation: {_settings(settings)}. "
        f"A prompt of more than {settings['max_prompt_tokens']} tokens loses its middle. The scores say "
        "nothing of other tasks, languages or longer texts; answers can be wrong.",
        "## Terms",
        f"- Base model: {licences.model}\n- Training data: {licences.data}",
        "## Where it comes from",
        f"Commit `{lineage['commit']}`{dirty}; the hashes are those in dvc.lock.",
        "\n".join(hashes),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}` {value}" for name, value in settings["generation"].items())
