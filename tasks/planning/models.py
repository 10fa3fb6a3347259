"""The config.json of a model: in a folder, in the hub's cache on this machine, or from the hub."""

import json
import logging
from pathlib import Path
from typing import Any

from tasks.stage import UserError

CONFIG = "config.json"


def config_at(source: str, revision: str | None, root: Path) -> dict[str, Any]:
    """The config of the model in a folder, or of a hub id at a revision; no weights are read.

    Raises UserError when it is not here and the hub cannot give it.
    """
    folder = root / source
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
        return config_at(base, None, root)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise UserError(f"{source} has no {CONFIG}: not a model in Hugging Face layout")
        found: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return found
    return json.loads(_from_hub(source, revision).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel("ERROR")  # each try again would be a line
    try:
        cached = try_to_load_from_cache(source, CONFIG, revision=revision)
        return Path(cached if isinstance(cached, str) else hf_hub_download(source, CONFIG, revision=revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"the config of {source} is not on this machine and the hub did not give it "
            f"({type(error).__name__}); go online once, or name a local folder"
        ) from error
