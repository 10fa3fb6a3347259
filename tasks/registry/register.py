"""What a registered version holds, as one folder.

model/           Hugging Face layout; an adapter that is kept apart has its base in model/base
settings.json    generation settings of the evaluation, limits of one request, seed, device
prompts.json     prompts of the evaluation, for the input example and for timing
evaluate.json    the scores, as in metrics/
lineage.json     commit, params, hashes, commands
README.md        the model card
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from tasks.stage import Compute, Section, UserError
from tasks.stage.files import write_json, write_text

TASKS = Path(__file__).parents[1]
CODE = ("lm", "stage", "compress")  # the packages of it that a served model runs; a copy travels with it
BASE = "base"  # the folder, in that of an adapter, of the model it belongs to
LIBRARIES = (
    "accelerate",
    "mlflow",
    "numpy",
    "peft",
    "pydantic",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
)
QUANTISERS = {
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
}  # quant_method in a config: library
Text = Annotated[str, Field(min_length=1)]


class Limits(Section):
    """How much one request to a served model may ask for."""

    prompts: PositiveInt
    characters: PositiveInt  # of one prompt
    max_new_tokens: PositiveInt


class Licences(Section):
    """Under which terms the base model and the training data are used, as the card states them."""

    model: Text
    data: Text


class Params(Section):
    """The section `register` of params.yaml.

    `variant` is one of evaluate.variants. An `adapter` is merged into one plain model, or kept separate beside
    the base it belongs to, both with the bytes they were trained with. With `int8_kernels` a model that
    quantize wrote as int8 computes with integers on a CPU: faster, and a little less exact.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    variant: str
    adapter: Literal["merged", "separate"]
    int8_kernels: bool
    limits: Limits
    licences: Licences


def pack_model(folder: Path, target: Path, adapter: Literal["merged", "separate"], compute: Compute) -> None:
    """Write to `target` a model that needs no other folder.

    Raises UserError when an adapter cannot be merged, or its base is not in a folder here.
    """
    from tasks.lm.model import ADAPTER_CONFIG, load, save
    from tasks.lm.peft import base_of, merged

    if not (folder / ADAPTER_CONFIG).is_file():
        shutil.copytree(folder, target)
    elif adapter == "merged":
        save(merged(load(folder, compute, trainable=True)), target)
    else:
        base = Path(base_of(folder))
        if not base.is_dir():
            raise UserError(
                f"{folder} belongs to {base}, which is no folder here: set register.adapter to merged"
            )
        shutil.copytree(folder, target)
        pack_model(base, target / BASE, adapter, compute)


def pack(
    target: Path,
    *,
    settings: Mapping[str, Any],
    prompts: Sequence[str],
    evaluation: Mapping[str, Any],
    lineage: Mapping[str, Any],
    card: str,
) -> None:
    """Write what stands beside the model to the folder `target`."""
    write_json(target / "settings.json", settings)
    write_json(target / "prompts.json", list(prompts))
    write_json(target / "evaluate.json", evaluation)
    write_json(target / "lineage.json", lineage)
    write_text(target / "README.md", card)


def copy_code(target: Path) -> None:
    """Copy the code that a served model runs to `target`, a folder named tasks."""
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    for name in CODE:
        shutil.copytree(TASKS / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))


def size(folder: Path) -> int:
    """Bytes in all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def requirements(model: Path) -> list[str]:
    """The libraries that serving the packed `model` needs, pinned to the versions that are installed here."""
    from importlib.metadata import version

    weights = model / BASE if (model / BASE).is_dir() else model
    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method")
    names = [*LIBRARIES, *([method] if method in QUANTISERS else [])]
    return [f"{name}=={version(name)}" for name in names]
