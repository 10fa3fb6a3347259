"""Which of the processes of a stage this one is, and what they tell each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor


class Sliceable(Protocol):
    """A list or a tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


S = TypeVar("S", bound=Sliceable)
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A rank among the `processes` of a stage. The first, of rank 0, is the one that writes and records.

    What is asked of the others (`any`, `add`, `gather`) all of them must ask at the same point.
    """

    rank: int = 0
    processes: int = 1

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return flag if self.processes == 1 else any(self.gather(flag))

    def add(self, tensor: "Tensor") -> None:
        """Replace `tensor`, in place, by its sum over all processes: the same bytes in each of them."""
        if self.processes > 1:
            from accelerate import PartialState
            from torch import distributed

            found = tensor.to(PartialState().device)
            distributed.all_reduce(found)
            tensor.copy_(found)

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in the order of their ranks."""
        if self.processes == 1:
            return [value]
        from torch import distributed

        found: list[T | None] = [None] * self.processes
        distributed.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    @contextmanager
    def first(self) -> Iterator[None]:
        """A block for the first process, and once that has left it for the others."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.gather(None)

    def together(self, part: list[T]) -> list[T]:
        """The parts of all processes, one behind the other, in the order of ranks."""
        return [each for found in self.gather(part) for each in found]

    def part(self, things: S) -> S:
        """The share of this process in a list or a tensor."""
        own = self.share(len(things))
        found: S = things[own.start : own.stop]
        return found

    def share(self, count: int) -> range:
        """Which of `count` things fall to this process: parts of nearly equal size, in the order of ranks."""
        return range(count * self.rank // self.processes, count * (self.rank + 1) // self.processes)


ALONE = Place()
