"""A job on a Ray cluster: the files of its models are sent along, and each process that works opens them once.

A process has a GPU of its own where the cluster has some; else as many CPUs as `compute.threads` says, or as
the smallest machine has, so that a machine opens the models once.
"""

import tempfile
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from tasks.data import cluster
from tasks.scoring.models import Job, Models, model_files
from tasks.scoring.prompts import Part
from tasks.stage import Compute
from tasks.stage.errors import say

Sent = Mapping[str, Any]  # name of a file -> where Ray keeps its bytes


@dataclass(frozen=True)
class Shipment:
    """A job and the folders that it names, by the names of its fields; two with one key are the same."""

    key: str
    job: Job = field(compare=False)
    folders: Mapping[str, Sent] = field(compare=False)


def answered(job: Job, fingerprint: str, parts: Iterator[Part], address: str) -> Generator[tuple[int, bytes]]:
    """The rows in each part, and its lines, in order. Raises as `cluster.joined` and `cluster.in_order`."""
    with cluster.joined(address):
        say(f"sending the models to the Ray cluster at {address}")
        shipment = Shipment(fingerprint, job, {name: _sent(folder) for name, folder in job.folders().items()})
        cpus, gpus = _share(job.compute)
        yield from cluster.in_order(partial(_answer, shipment), parts, cpus, gpus)


def _answer(shipment: Shipment, part: Part) -> tuple[int, bytes]:
    return len(part.rows), _models(shipment).lines(part)


@cache
def _models(shipment: Shipment) -> Models:
    """The models of a shipment. Once they are open their files are needed no more."""
    import ray

    with tempfile.TemporaryDirectory(prefix="lifecycle-") as scratch:
        for folder, files in shipment.folders.items():
            for name, reference in files.items():
                path = Path(scratch, folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(ray.get(reference))
        there = {name: Path(scratch, name) for name in shipment.folders}
        return Models(shipment.job.moved(there))


def _sent(folder: Path) -> Sent:
    import ray

    return {name: ray.put(path.read_bytes()) for name, path in model_files(folder).items()}


def _share(compute: Compute) -> tuple[int, int]:
    """CPUs and GPUs of a process that answers."""
    import ray

    if compute.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0):
        return 1, 1
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return compute.threads or int(min(filter(None, cpus), default=1)), 0
