"""What a teacher makes of its student's lessons: computed once, and kept in memory-mapped files.

Writing down the likeliest tokens, and the states they come from, costs one forward pass of the teacher, however
often a lesson is repeated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from tasks.compress.distillation import SoftTargets, soft_targets
from tasks.lm.collate import Batch, batches_by_length, collate
from tasks.lm.model import LanguageModel
from tasks.lm.respond import States, model_inputs, output_states
from tasks.lm.train import Pair
from tasks.stage import checkpoints
from tasks.stage.files import new_folder

IDS, LOGPROBS, PROMPT_STATES, RESPONSE_STATES = "ids.npy", "logprobs.npy", "prompts.npy", "responses.npy"


class Kept(NamedTuple):
    """The last hidden states of a teacher, as `tasks.lm.respond.States` has them, without padding."""

    prompts: NDArray[np.float32]  # [prompt tokens, D]
    responses: NDArray[np.float32]  # [response tokens, D]


@dataclass(frozen=True)
class Foreseen:
    """What a teacher foresees at each response token of some pairs."""

    prompt_starts: NDArray[np.int64]  # [pairs + 1], where the prompt tokens of each pair begin
    starts: NDArray[np.int64]  # [pairs + 1], where the response tokens of each pair begin
    ids: NDArray[np.int32]  # [response tokens, k]
    logprobs: NDArray[np.float32]  # [response tokens, k + 1]
    kept: Kept | None

    def of(self, rows: Sequence[int]) -> SoftTargets:
        """The soft targets of the response tokens of these pairs, one pair behind the other."""
        at = _spans(self.starts, rows)
        return SoftTargets(torch.from_numpy(self.ids[at]).long(), torch.from_numpy(self.logprobs[at]))

    def states(self, rows: Sequence[int], batch: Batch) -> States | None:
        """The states of these pairs, padded as in the `batch` that holds them; None: they were not kept."""
        if self.kept is None:
            return None
        return States(
            _padded(self.kept.prompts[_spans(self.prompt_starts, rows)], batch.prompt_mask),
            _padded(self.kept.responses[_spans(self.starts, rows)], batch.response_mask),
        )


def foresee(
    teacher: LanguageModel,
    pairs: Sequence[Pair],
    temperature: float,
    top_k: int | None,
    folder: Path,
    *,
    keep_states: bool,
    batch_size: int,
    progress: Callable[[int], object],
) -> Foreseen:
    """Let the teacher read all pairs and write what it foresees to `folder`; what is there already is taken.

    `progress` is told how many pairs each batch held.
    """
    prompt_starts, starts = (np.cumsum([0, *map(len, part)]) for part in zip(*pairs, strict=True))
    if not (folder / checkpoints.MANIFEST).is_file() or checkpoints.problem(folder) is not None:
        size = teacher.model.get_output_embeddings().weight.shape[0]
        named = size if top_k is None else min(top_k, size)
        with new_folder(folder) as temporary:
            found = Foreseen(
                prompt_starts,
                starts,
                open_memmap(temporary / IDS, mode="w+", dtype=np.int32, shape=(int(starts[-1]), named)),
                _floats(temporary / LOGPROBS, starts, named + 1),
                _no_states(teacher, prompt_starts, starts, temporary) if keep_states else None,
            )
            _write(teacher, pairs, temperature, top_k, found, batch_size, progress)
            checkpoints.seal(temporary)
    ids, logprobs = (np.load(folder / name, mmap_mode="r") for name in (IDS, LOGPROBS))
    kept = (np.load(folder / name, mmap_mode="r") for name in (PROMPT_STATES, RESPONSE_STATES))
    return Foreseen(prompt_starts, starts, ids, logprobs, Kept(*kept) if keep_states else None)


def state_bytes(teacher: LanguageModel, pairs: Sequence[Pair]) -> int:
    """Bytes that the states of all pairs take."""
    tokens = sum(len(prompt) + len(response) for prompt, response in pairs)
    return int(tokens * teacher.model.config.hidden_size * np.dtype(np.float32).itemsize)


def _no_states(
    teacher: LanguageModel, prompt_starts: NDArray[np.int64], starts: NDArray[np.int64], folder: Path
) -> Kept:
    width = teacher.model.config.hidden_size
    return Kept(
        _floats(folder / PROMPT_STATES, prompt_starts, width), _floats(folder / RESPONSE_STATES, starts, width)
    )


def _floats(path: Path, starts: NDArray[np.int64], width: int) -> "np.memmap[Any, np.dtype[np.float32]]":
    return open_memmap(path, mode="w+", dtype=np.float32, shape=(int(starts[-1]), width))


def _write(
    teacher: LanguageModel,
    pairs: Sequence[Pair],
    temperature: float,
    top_k: int | None,
    found: Foreseen,
    batch_size: int,
    progress: Callable[[int], object],
) -> None:
    for rows in batches_by_length([len(prompt) + len(response) for prompt, response in pairs], batch_size):
        batch = collate(teacher, *zip(*(pairs[row] for row in rows), strict=True)).to(teacher.device)
        inputs = model_inputs(teacher, batch)
        width = inputs.pop("labels").shape[1]
        prompts, responses = batch.prompt_mask.bool(), batch.response_mask.bool()
        with torch.inference_mode():
            outputs = teacher.model(**inputs, output_hidden_states=found.kept is not None)
            targets = soft_targets(outputs.logits[:, :width][responses], temperature, top_k)
        at = _spans(found.starts, rows)
        found.ids[at], found.logprobs[at] = targets.ids.cpu().numpy(), targets.logprobs.cpu().numpy()
        if found.kept is not None:
            states = output_states(teacher, batch, outputs)
            found.kept.prompts[_spans(found.prompt_starts, rows)] = states.prompt[prompts].float().cpu().numpy()
            found.kept.responses[at] = states.response[responses].float().cpu().numpy()
        progress(len(rows))


def _spans(starts: NDArray[np.int64], rows: Sequence[int]) -> NDArray[np.int64]:
    """The places of the tokens of these pairs."""
    return np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])


def _padded(states: NDArray[np.float32], mask: Tensor) -> Tensor:
    """`[B, T, D]` of the states `[tokens, D]` that stand one behind the other where `mask` `[B, T]` is 1."""
    padded = torch.zeros((*mask.shape, states.shape[1]))
    padded[mask.bool()] = torch.from_numpy(states)
    return padded
