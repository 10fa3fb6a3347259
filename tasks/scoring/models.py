"""The models of a batch: one that answers, and those that score its answers."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.metrics.detector import Classifier, Oracle, scorer
from tasks.playground.answering import BASE, open_folder
from tasks.scoring.prompts import PROMPT, Part
from tasks.stage import Compute
from tasks.stage.errors import say
from tasks.stage.fingerprint import hash_file

DIGITS = 4  # of scores; further ones depend on the machine


class Job(NamedTuple):
    """Who answers, how, and who scores. Without a reward model no answer has a reward."""

    model: Path
    reward: Path | None
    toxicity: Oracle | Classifier
    generation: Mapping[str, Any]
    batch_size: int
    max_prompt_tokens: int
    seed: int
    compute: Compute

    def folders(self) -> dict[str, Path]:
        """Its models that are folders, by field: `model`, and `reward` and `toxicity` where they are."""
        found = {"model": self.model}
        if self.reward is not None:
            found["reward"] = self.reward
        if isinstance(self.toxicity, Classifier) and Path(self.toxicity.source).is_dir():
            found["toxicity"] = Path(self.toxicity.source)
        return found

    def moved(self, folders: Mapping[str, Path]) -> "Job":
        """The same job with its `folders()` elsewhere."""
        toxicity = self.toxicity
        if isinstance(toxicity, Classifier) and "toxicity" in folders:
            toxicity = toxicity.model_copy(update={"source": str(folders["toxicity"])})
        return self._replace(model=folders["model"], reward=folders.get("reward"), toxicity=toxicity)

    def fingerprint(self) -> str:
        """What its answers and scores depend on, as one hash: the files of models count, not where they lie."""
        files = {
            field: {name: hash_file(path) for name, path in model_files(folder).items()}
            for field, folder in self.folders().items()
        }
        settings = {
            "toxicity": self.toxicity.model_dump(),
            "generation": self.generation,
            "batch_size": self.batch_size,
            "max_prompt_tokens": self.max_prompt_tokens,
            "seed": self.seed,
            "compute": self.compute.model_dump(),
        }
        return hashlib.sha256(json.dumps([files, settings], sort_keys=True).encode()).hexdigest()


class Models:
    """The opened models of a job."""

    def __init__(self, job: Job) -> None:
        """Raises UserError when a model cannot be opened."""
        from tasks.lm.classifier import load_classifier
        from tasks.lm.peft import merged_to_answer
        from tasks.stage.determinism import prepare_torch

        say(f"opening {job.model.name}")
        prepare_torch(job.seed, job.compute)
        self._job = job
        self._lm = merged_to_answer(open_folder(job.model, job.compute))
        self._reward = None if job.reward is None else load_classifier(job.reward, job.compute)
        self._toxicity = scorer(job.toxicity, job.batch_size, job.compute)

    def lines(self, part: Part, progress: Callable[[int], object] | None = None) -> bytes:
        """The rows of a part with answers and scores, as JSON lines; they depend on the part and the job alone.

        `progress` is told how many prompts each batch answered.
        """
        from tasks.lm.classifier import scores
        from tasks.lm.respond import respond

        prompts = [row[PROMPT] for row in part.rows]
        answers = respond(
            self._lm,
            prompts,
            self._job.generation,
            batch_size=self._job.batch_size,
            seed=self._job.seed + part.first,  # no two parts are answered by the same draws
            max_prompt_tokens=self._job.max_prompt_tokens,
            progress=progress,
        )
        found: dict[str, list[Any]] = {
            "answer": answers,
            "toxicity": list(map(_round, self._toxicity(answers))),
        }
        if self._reward is not None:
            rewards = scores(self._reward, prompts, answers, batch_size=self._job.batch_size)
            found["reward"] = list(map(_round, rewards))
        rows = [row | {name: values[at] for name, values in found.items()} for at, row in enumerate(part.rows)]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model by their names in a folder that needs no other: that of an adapter has its base in
    `base`, unless that is on the hub.
    """
    from tasks.lm.model import ADAPTER_CONFIG
    from tasks.lm.peft import base_of

    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if ADAPTER_CONFIG in found and not (folder / BASE).is_dir() and (base := Path(base_of(folder))).is_dir():
        found |= {f"{BASE}/{name}": path for name, path in model_files(base).items()}
    return found


def _round(score: float) -> float:
    return round(float(score), DIGITS)
