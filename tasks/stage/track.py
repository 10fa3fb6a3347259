"""What a stage may record about its run. Recording observes: it changes no output and stops no stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Track(Protocol):
    """The record of one run. Nothing here raises when the tracking server is away."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings; nested mappings become dotted names, secrets are blotted out."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers, as points of learning curves when `step` is given."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record rows (same keys in each) as a table that the tracking UI shows."""

    def figure(self, name: str, path: Path) -> None:
        """Record the picture at `path` as `figures/NAME` with the suffix of `path`."""

    def artifact(self, path: Path) -> None:
        """Record a small file or folder; model bytes belong to DVC."""

    def dataset(self, name: str, path: Path, digest: str, rows: int) -> None:
        """Record which data the run read."""


class NullTrack:
    """Records nothing: for tests and benchmarks."""

    def params(self, values: Mapping[str, Any]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None: ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def figure(self, name: str, path: Path) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def dataset(self, name: str, path: Path, digest: str, rows: int) -> None: ...
