"""The page to try the models, until Ctrl-C: `lifecycle chat`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from flows import pages
from tasks.playground.answering import Variant, open_playground
from tasks.registry import store
from tasks.registry.register import Params as Register
from tasks.stage.errors import say
from tasks.stage.params import PARAMS_FILE, read_section, read_yaml


def chat(root: Path, versions: Sequence[str], host: str, port: int) -> None:
    """Serve the page with the variants whose folder is there, and registered `versions` (numbers or aliases).

    Raises UserError when there is no model, no such version, or `host` and `port` cannot be had.
    """
    pages.check_host(host, port)
    with tempfile.TemporaryDirectory() as scratch:
        registered = dict(_fetched(wanted, Path(scratch)) for wanted in versions)
        playground = open_playground(root, registered)
        say("loading the libraries (some ten seconds) …")
        from tasks.playground.page import build
        from tasks.playground.style import STYLE

        pages.launch(build(playground), host, port, STYLE)


def _fetched(wanted: str, scratch: Path) -> tuple[str, Variant]:
    """A registered version by its name on the page, its model in `scratch`."""
    version = store.find(read_section(read_yaml(PARAMS_FILE), "register", Register).name, wanted)
    say(f"fetching version {version.number}")
    folder = scratch / version.number
    folder.mkdir(exist_ok=True)
    stored = store.download(version, folder)
    return f"version {version.number}", Variant(stored / "artifacts" / store.PACKED / "model", 0)
