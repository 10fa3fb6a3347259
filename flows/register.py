"""Put a variant into the model registry, with all that tells where it comes from."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from flows import lineage, pipeline, verify
from flows.run import Run, metrics, plan
from tasks.registry import store
from tasks.registry.card import card
from tasks.registry.register import Params, copy_code, pack, pack_model, requirements, size
from tasks.registry.store import Version
from tasks.stage import tracking
from tasks.stage.errors import UserError, say
from tasks.stage.fingerprint import hash_path
from tasks.stage.params import PARAMS_FILE, check_all, read_section, read_shared, read_yaml
from tasks.stage.recorder import numbers
from tasks.stage.run import git_tags

EVALUATE = "evaluate"
SAMPLES = Path("reports") / "evaluate" / "samples.jsonl"


def register(
    root: Path, variant: str | None, adapter: Literal["merged", "separate"] | None, allow_dirty: bool
) -> Version:
    """Register a variant of the evaluation; without `variant` and `adapter`, as params.yaml says.

    Raises UserError when the variant, or what was made of it, is not what dvc.lock and git say.
    """
    check_all()
    data = read_yaml(PARAMS_FILE)
    params = read_section(data, "register", Params)
    chosen = variant or params.variant
    folder = Path("models") / _model(data, chosen)
    git = _commit(allow_dirty)
    run, stage = _made(root, folder)
    evaluation = metrics(root, EVALUATE)
    shared = read_shared(data)
    settings = {
        "generation": data[EVALUATE]["generation"],
        "batch_size": data[EVALUATE]["batch_size"],
        "max_prompt_tokens": data[EVALUATE]["max_prompt_tokens"],
        "limits": params.limits.model_dump(),
        "seed": shared.seed,
        "compute": shared.compute.model_dump(),
        "int8_kernels": params.int8_kernels,
    }
    prompts = [json.loads(line)["prompt"] for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        packed, code = Path(scratch) / store.PACKED, Path(scratch) / "tasks"
        packed.mkdir()
        say(f"packing {folder}")
        pack_model(folder, packed / "model", adapter or params.adapter, shared.compute)
        if params.int8_kernels:
            from tasks.registry.answering import open_packed

            open_packed(packed / "model", shared.compute, int8_kernels=True)  # or say now that it cannot be
        known = lineage.record(root, run.stages, git) | {
            "variant": chosen,
            "stage": stage,
            "targets": [stage, EVALUATE],
            "model": {"bytes": size(packed / "model"), "sha256": hash_path(packed / "model")},
        }
        text = card(params.name, known, evaluation, settings, params.licences)
        pack(packed, settings=settings, prompts=prompts, evaluation=evaluation, lineage=known, card=text)
        copy_code(code)
        say(f"storing it in {tracking.address()}")
        return store.add(
            params.name,
            packed,
            code,
            example=[{"prompt": prompts[0], "max_new_tokens": params.limits.max_new_tokens}],
            requirements=requirements(packed / "model"),
            description=text,
            tags=_tags(known, git),
            metrics=numbers(evaluation[chosen]),
        )


def _model(data: Mapping[str, Any], variant: str) -> str:
    """The folder under models/ of a variant."""
    variants = data[EVALUATE]["variants"]
    if variant not in variants:
        raise UserError(f"{variant} is none of evaluate.variants: {', '.join(variants)}")
    if variants[variant]["shots"]:
        raise UserError(
            f"{variant} has worked examples in its prompts, which no request brings: register one without"
        )
    return str(variants[variant]["model"])


def _commit(allow_dirty: bool) -> dict[str, str]:
    git = git_tags()
    if "git.commit" not in git:
        raise UserError("there is no git commit: a version names the one it was made from; commit first")
    if git["git.dirty"] == "true" and not allow_dirty:
        raise UserError(
            "code or params differ from the commit: commit them first, or say --allow-dirty (and nobody can "
            "make the version again)"
        )
    return git


def _made(root: Path, folder: Path) -> tuple[Run, str]:
    """The stages behind the model and its evaluation, all up to date and unharmed, and the one that made it."""
    graph = pipeline.read_graph(root)
    makers = [name for name, stage in graph.items() if str(folder) in stage.outputs]
    if not makers:
        raise UserError(f"no stage in dvc.yaml makes {folder}")
    run = plan(root, [makers[0], EVALUATE])
    for name in run.stages:
        if name in run.due:
            why = "; ".join(map(str, run.changed[name])) or "after a stage that is not"
            raise UserError(f"{name} is not up to date ({why}): `lifecycle run` first")
    changed = verify.changed(root, list(run.stages))
    if changed:
        raise UserError(
            f"{', '.join(changed)}: not what dvc.lock says; `lifecycle verify` tells how to mend it"
        )
    return run, makers[0]


def _tags(known: Mapping[str, Any], git: Mapping[str, str]) -> dict[str, str]:
    outputs = {f"dvc.out.{path}": digest for path, digest in known["outputs"].items()}
    return {
        **git,
        "variant": known["variant"],
        "dvc.stage": known["stage"],
        "model.sha256": known["model"]["sha256"],
        **{
            name: value
            for name, value in outputs.items()
            if name.startswith(("dvc.out.data", "dvc.out.models"))
        },
    }
