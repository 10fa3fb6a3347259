"""Give the alias `champion` to a version that passes every gate; one that does not changes nothing."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tasks.registry import store
from tasks.registry.gates import Candidate, Verdict, latency_verdicts, verdicts
from tasks.registry.latency import mean_seconds, ratio_of_seconds, seconds
from tasks.registry.promote import Latency, Params
from tasks.registry.register import Params as Register
from tasks.registry.store import CHAMPION, Version
from tasks.stage.errors import GateRefused, UserError, say
from tasks.stage.fingerprint import hash_path
from tasks.stage.params import PARAMS_FILE, read_section, read_shared, read_yaml

EXAMPLES = "data/examples"


class Entrant(NamedTuple):
    """A version, and what was recorded when it was registered."""

    version: Version
    lineage: dict[str, Any]

    def candidate(self) -> Candidate:
        """What the gates want to know of it."""
        evaluation = json.loads(store.read(self.version, "evaluate.json"))
        return Candidate(
            self.version.number, self.lineage["variant"], evaluation, self.lineage["model"]["bytes"]
        )


def judge(wanted: str) -> tuple[Version, Version | None, list[Verdict]]:
    """The version `wanted` (a number or an alias), the champion if there is one, and the verdict of each gate.

    Raises UserError for an unknown version, one that is champion already, or one whose stored model changed.
    """
    data = read_yaml(PARAMS_FILE)
    name, params = read_section(data, "register", Register).name, read_section(data, "promote", Params)
    ours, champion = store.find(name, wanted), store.look(name, CHAMPION)
    if champion is not None and champion.number == ours.number:
        raise UserError(f"version {ours.number} is the champion already")
    entrants = [_entrant(version) for version in (ours, champion) if version is not None]
    if len({entrant.lineage["outputs"].get(EXAMPLES) for entrant in entrants}) > 1:
        say("warning: the two versions were evaluated on different test examples")
    candidates = [entrant.candidate() for entrant in entrants]
    found = verdicts(params, candidates[0], candidates[1] if champion is not None else None)
    found += _latency(params.seconds, entrants, read_shared(data).seed)
    return ours, champion, found


def promote(ours: Version, champion: Version | None, found: list[Verdict]) -> None:
    """Move the alias. Raises GateRefused, a line for each gate that said no, before anything is changed."""
    refused = [verdict for verdict in found if not verdict.passed]
    if refused:
        lines = [f"version {ours.number} is not promoted: {len(refused)} of {len(found)} gates said no"]
        raise GateRefused("\n".join([*lines, *map(str, refused)]))
    store.promote(ours, champion, json.dumps([verdict.as_json() for verdict in found]))


def show(ours: Version, champion: Version | None, found: list[Verdict]) -> None:
    """Print a line a gate."""
    against = (
        f"the champion is version {champion.number}" if champion is not None else "there is no champion yet"
    )
    sys.stdout.write(f"version {ours.number}; {against}\n")
    for verdict in found:
        sys.stdout.write(f"{'passed' if verdict.passed else 'no    '}  {verdict}\n")


def _latency(params: Latency, entrants: list[Entrant], seed: int) -> list[Verdict]:
    say(f"timing {' and '.join(f'version {entrant.version.number}' for entrant in entrants)}")
    prompts = json.loads(store.read(entrants[0].version, "prompts.json"))[: params.prompts]
    with tempfile.TemporaryDirectory() as scratch:
        models = [_downloaded(entrant, Path(scratch) / entrant.version.number) for entrant in entrants]
        ours, *theirs = seconds(models, prompts, params.repeats)
    samples = params.bootstrap_samples
    return latency_verdicts(
        params,
        mean_seconds(ours, samples, seed),
        ratio_of_seconds(ours, theirs[0], samples, seed) if theirs else None,
    )


def _downloaded(entrant: Entrant, folder: Path) -> Path:
    folder.mkdir()
    stored = store.download(entrant.version, folder)
    if hash_path(stored / "artifacts" / store.PACKED / "model") != entrant.lineage["model"]["sha256"]:
        raise UserError(
            f"the stored model of version {entrant.version.number} is not the one that was registered"
        )
    return stored


def _entrant(version: Version) -> Entrant:
    return Entrant(version, json.loads(store.read(version, "lineage.json")))
