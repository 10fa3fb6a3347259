"""What a teacher makes of its student's lessons: computed once, and kept in memory-mapped files.

Writing down the likeliest tokens costs one forward pass of the teacher, however often a lesson is repeated, and
then the teacher can leave the memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from tasks.compress.distillation import SoftTargets, soft_targets
from tasks.lm.model import LanguageModel
from tasks.lm.respond import batches_by_length, collate, response_logits
from tasks.lm.train import Pair
from tasks.stage import checkpoints
from tasks.stage.files import new_folder

IDS, LOGPROBS = "ids.npy", "logprobs.npy"


@dataclass(frozen=True)
class Foreseen:
    """What a teacher foresees at each response token of some pairs."""

    starts: NDArray[np.int64]  # [pairs + 1], where the tokens of each pair begin
    ids: NDArray[np.int32]  # [tokens, k]
    logprobs: NDArray[np.float32]  # [tokens, k + 1]

    def of(self, rows: Sequence[int]) -> SoftTargets:
        """The soft targets of the response tokens of these pairs, one pair behind the other."""
        at = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])
        return SoftTargets(torch.from_numpy(self.ids[at]).long(), torch.from_numpy(self.logprobs[at]))


def foresee(
    teacher: LanguageModel,
    pairs: Sequence[Pair],
    temperature: float,
    top_k: int | None,
    folder: Path,
    *,
    batch_size: int,
    progress: Callable[[int], object],
) -> Foreseen:
    """Let the teacher read all pairs and write what it foresees to `folder`; what is there already is taken.

    `progress` is told how many pairs each batch held.
    """
    starts = np.cumsum([0, *(len(response) for _, response in pairs)])
    if not (folder / checkpoints.MANIFEST).is_file() or checkpoints.problem(folder) is not None:
        with new_folder(folder) as temporary:
            _write(teacher, pairs, starts, temperature, top_k, temporary, batch_size, progress)
            checkpoints.seal(temporary)
    ids, logprobs = (np.load(folder / name, mmap_mode="r") for name in (IDS, LOGPROBS))
    return Foreseen(starts, ids, logprobs)


def _write(
    teacher: LanguageModel,
    pairs: Sequence[Pair],
    starts: NDArray[np.int64],
    temperature: float,
    top_k: int | None,
    folder: Path,
    batch_size: int,
    progress: Callable[[int], object],
) -> None:
    size = teacher.model.get_output_embeddings().weight.shape[0]
    named = size if top_k is None else min(top_k, size)
    ids = open_memmap(folder / IDS, mode="w+", dtype=np.int32, shape=(int(starts[-1]), named))
    logprobs = open_memmap(folder / LOGPROBS, mode="w+", dtype=np.float32, shape=(int(starts[-1]), named + 1))
    for rows in batches_by_length([len(prompt) + len(response) for prompt, response in pairs], batch_size):
        batch = collate(teacher, *zip(*(pairs[row] for row in rows), strict=True))
        with torch.inference_mode():
            logits = response_logits(teacher, batch)[batch.response_mask.bool().to(teacher.device)]
            found = soft_targets(logits, temperature, top_k)
        at = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
        ids[at], logprobs[at] = found.ids.cpu().numpy(), found.logprobs.cpu().numpy()
        progress(len(rows))
    ids.flush()
    logprobs.flush()
