"""What a stage gets besides its params and paths."""

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tasks.stage.errors import Helped, Interrupted
from tasks.stage.params import Compute
from tasks.stage.place import ALONE, Place
from tasks.stage.progress import Bar, progress
from tasks.stage.track import Track

SECONDS_TO_SAVE = 20  # from a stop request to the end of a body that does not react to it


class Stop:
    """A request to stop, and whether the body is in the middle of something that must be saved first."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.saving = False

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from now on (main thread only)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_request)
        signal.signal(signal.SIGALRM, self._on_time_up)

    def ignore(self) -> None:
        """From now on the stage is ending anyway: further requests change nothing."""
        signal.alarm(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def raise_if_requested(self) -> None:
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)

    def _on_request(self, number: int, _frame: FrameType | None) -> None:
        first = self.signal_number is None
        self.signal_number = number
        signal.alarm(SECONDS_TO_SAVE)
        if not (first and self.saving):
            raise Interrupted(number)

    def _on_time_up(self, _number: int, _frame: FrameType | None) -> None:
        signal.alarm(1)  # raised again if this one is swallowed (in a __del__, say)
        self.raise_if_requested()


@dataclass(frozen=True)
class Context:
    """What a stage gets besides its params and paths.

    `work` is the checkpoint folder of exactly these inputs and params (its fingerprint): what lies there may be
    resumed. `track` records the run. `place` says whether this process is alone or which of several that train
    together.
    """

    name: str
    seed: int
    compute: Compute
    work: Path
    track: Track
    stop: Stop = field(default_factory=Stop)
    progress_file: Path | None = None
    place: Place = ALONE

    def progress(self, total: int | None, description: str) -> AbstractContextManager[Bar]:
        """A bar with the time left, on stderr; use it for anything that takes over 2 s."""
        return progress(total, description, self.progress_file)

    @property
    def stopping(self) -> bool:
        """Whether the stage was asked to stop: save a checkpoint and leave the `save_on_stop` block.

        All processes of a stage ask at the same point, and all get the same answer.
        """
        if self.place.any(self.stop.signal_number is not None) and self.stop.signal_number is None:
            self.stop.signal_number = signal.SIGTERM  # another process has heard of it first
        return self.stop.signal_number is not None

    def first_alone(self) -> None:
        """From here on nothing is done together: the first process goes on alone, and all others end well."""
        if self.place.rank > 0:
            raise Helped

    @contextmanager
    def save_on_stop(self) -> Iterator[None]:
        """Inside the block a stop request only sets `stopping`; leaving the block then raises Interrupted.

        Outside such a block a stop request raises Interrupted at once. A body that has not left the block
        `SECONDS_TO_SAVE` after the request, or a second request, is interrupted where it stands.
        """
        self.stop.saving = True
        try:
            yield
        finally:
            self.stop.saving = False
        self.stop.raise_if_requested()
