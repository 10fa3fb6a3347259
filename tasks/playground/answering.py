"""Variants that answer: each model is opened when it is first asked, and then stays.

One answer at a time: torch's random state is one, and the models share the processor.
"""

import random
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks.data.records import Example, read_examples
from tasks.evaluate import Params, chosen, sample_answers, shot_prompts
from tasks.playground.settings import Settings
from tasks.stage import Compute, UserError
from tasks.stage.params import PARAMS_FILE, read_section, read_shared, read_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.lm.classifier import Classifier
    from tasks.lm.model import LanguageModel
    from tasks.metrics.toxicity import Scorer
    from tasks.playground.distribution import Step

BASE = "base"  # in the folder of a registered adapter, the folder of the model it belongs to
FEW = 2  # worked examples of a few-shot prompt, where no variant of the evaluation has more
MAX_CHARACTERS = 20_000


class Variant(NamedTuple):
    """A model's folder, and how many worked examples its prompts begin with in the evaluation."""

    folder: Path
    shots: int


class Answer(NamedTuple):
    """What a variant said, and what it was given."""

    variant: str
    prompt: str  # with its worked examples
    shots: int  # how many of these fitted
    prompt_ids: list[int]  # after the middle of a prompt that was too long was cut out
    cut: int  # so many tokens
    ids: list[int]  # of the answer, its end token included
    pieces: list[str]  # the text that each token adds
    sureness: list[float]  # the model's probability of each token
    text: str
    toxicity: float  # the probability
    reward: float | None
    seconds: float  # that answering took, without opening the model


class Playground:
    """All that the page asks: examples, prompts, answers, distributions."""

    def __init__(
        self,
        params: Params,
        variants: Mapping[str, Variant],
        examples: Path,
        reward: Path | None,
        compute: Compute,
        seed: int,
    ) -> None:
        self.params, self.variants, self.seed = params, dict(variants), seed
        self.few = max(FEW, *(variant.shots for variant in params.variants.values()))
        self._examples, self._reward_folder, self._compute = examples, reward, compute
        self._models: dict[Path, LanguageModel] = {}
        self._train: dict[str, list[Example]] = {}
        self._test: dict[str, list[Example]] | None = None
        self._scorer: Scorer | None = None
        self._classifier: Classifier | None = None
        self._turn = threading.RLock()

    def tasks(self) -> list[str]:
        """The tasks of the test examples, the main one first. Raises UserError without examples."""
        return list(self._test_examples())

    def example(self, task: str, number: int) -> Example:
        """The test example `number` of a task, in the order in which the evaluation takes them, over and over.

        Raises UserError when there is none.
        """
        found = self._test_examples().get(task)
        if not found:
            raise UserError(f"the test examples have no task {task}: choose another")
        return found[number % len(found)]

    def with_worked(self, variant: str, prompt: str, task: str, shots: int) -> tuple[str, int]:
        """The prompt after `shots` worked examples of `task`, or the last of them that fit, and how many did.

        They are those of the evaluation. Raises UserError when there are not so many.
        """
        if shots == 0:
            return prompt, 0
        worked = self._worked(task)[:shots]
        asked = Example(
            id="asked", task=task, instruction="{input}", input=prompt, outputs=("-",), group="asked"
        )
        with self._turn:
            limit = self.params.max_prompt_tokens
            whole = shot_prompts(self.model(variant), [asked], worked, limit)[0]
        fitted = next(
            count
            for count in range(shots + 1)
            if whole == "\n\n".join([*(f"{e.prompt}\n{e.reference}" for e in worked[shots - count :]), prompt])
        )
        return whole, fitted

    def answer(self, variant: str, prompt: str, task: str, shots: int, settings: Settings) -> Answer:
        """Let a variant answer. Raises UserError when it cannot."""
        from tasks.lm.collate import encode_prompts

        check_prompt(prompt)
        with self._turn:
            lm = self.model(variant)
            whole, fitted = self.with_worked(variant, prompt, task, shots)
            started = time.perf_counter()
            full = encode_prompts(lm, [whole])[0]
            prompt_ids = encode_prompts(lm, [whole], self.params.max_prompt_tokens)[0]
            seed, generation = settings.seed, settings.generation()
            ids = sample_answers(lm, [prompt_ids], generation, 1, seed, lambda _: None)[0]
            text = lm.tokenizer.decode(ids, skip_special_tokens=True).strip()
            seconds = time.perf_counter() - started
            return Answer(
                variant,
                whole,
                fitted,
                prompt_ids,
                len(full) - len(prompt_ids),
                ids,
                pieces(lm, ids),
                self._sureness(lm, prompt_ids, ids),
                text,
                self._toxicity(text),
                self._reward(prompt, text),
                seconds,
            )

    def steps(self, answer: Answer, position: int, settings: Settings) -> "list[Step]":
        """The distributions of the token at `position` of an answer, under `settings`."""
        from tasks.playground.distribution import Before, steps

        with self._turn:
            lm = self.model(answer.variant)
            logits = self._logits(lm, answer.prompt_ids, answer.ids[: position + 1])[position]
            start = [lm.model.config.decoder_start_token_id] if lm.is_encoder_decoder else answer.prompt_ids
            before = Before([*start, *answer.ids[:position]], position)
            return steps(logits, before, settings, lm.model.generation_config)

    def texts(self, variant: str, tokens: Sequence[int]) -> dict[int, str]:
        """The text of each token."""
        tokenizer = self.model(variant).tokenizer
        return {token: tokenizer.decode([token]) for token in tokens}

    def model(self, variant: str) -> "LanguageModel":
        """The model of a variant, opened the first time. Raises UserError when it cannot be."""
        if variant not in self.variants:
            raise UserError(f"there is no variant {variant}: choose among {', '.join(self.variants)}")
        folder = self.variants[variant].folder
        with self._turn:
            if folder not in self._models:
                from tasks.lm.peft import merged_to_answer

                self._models[folder] = merged_to_answer(open_folder(folder, self._compute))
            return self._models[folder]

    @staticmethod
    def _logits(lm: "LanguageModel", prompt_ids: Sequence[int], ids: Sequence[int]) -> "Tensor":
        """What the model says of each token of an answer: `[T, V]`, on the CPU."""
        import torch

        from tasks.lm.collate import collate
        from tasks.lm.respond import response_logits

        with torch.inference_mode():
            return response_logits(lm, collate(lm, [prompt_ids], [ids]))[0].cpu()

    def _sureness(self, lm: "LanguageModel", prompt_ids: list[int], ids: list[int]) -> list[float]:
        import torch

        chances = self._logits(lm, prompt_ids, ids).softmax(dim=-1)
        found: list[float] = chances.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1).tolist()
        return found

    def _toxicity(self, text: str) -> float:
        if self._scorer is None:
            from tasks.metrics.detector import scorer

            self._scorer = scorer(self.params.toxicity, self.params.batch_size, self._compute)
        return float(self._scorer([text])[0])

    def _reward(self, prompt: str, text: str) -> float | None:
        """The reward model has learnt from prompts without worked examples."""
        if self._reward_folder is None:
            return None
        from tasks.lm.classifier import load_classifier, scores

        if self._classifier is None:
            self._classifier = load_classifier(self._reward_folder, self._compute)
        return scores(self._classifier, [prompt], [text], batch_size=1)[0]

    def _test_examples(self) -> dict[str, list[Example]]:
        with self._turn:
            if self._test is None:
                self._test = chosen(read_examples(self._examples / "test.jsonl"), self.params)
            return self._test

    def _worked(self, task: str) -> list[Example]:
        with self._turn:
            if task not in self._train:
                train = read_examples(self._examples / "train.jsonl", tasks=[task])
                if len(train) < self.few:
                    raise UserError(
                        f"{self._examples / 'train.jsonl'} has {len(train)} examples of the task {task}, "
                        "too few for worked ones: choose another task, or zero-shot"
                    )
                self._train[task] = random.Random(self.seed).sample(train, k=self.few)
            return self._train[task]


def open_playground(root: Path, registered: Mapping[str, Variant]) -> Playground:
    """The playground of a repository: the variants of its evaluation whose folder is there, and others.

    Raises UserError when params.yaml is wrong, or there is nothing to ask.
    """
    data = read_yaml(root / PARAMS_FILE)
    params, shared = read_section(data, "evaluate", Params), read_shared(data)
    models = root / "models"
    evaluated = {
        name: Variant(models / variant.model, variant.shots)
        for name, variant in params.variants.items()
        if (models / variant.model).is_dir()
    }
    if not evaluated and not registered:
        raise UserError("none of evaluate.variants has its folder under models/: `lifecycle run` makes them")
    named = params.alignment.reward if params.alignment is not None else None
    reward = models / (named or "reward")
    return Playground(
        params,
        evaluated | dict(registered),
        root / "data" / "examples",
        reward if reward.is_dir() else None,
        shared.compute,
        shared.seed,
    )


def check_prompt(prompt: str) -> None:
    """Raise UserError for a prompt that cannot be answered."""
    if not prompt.strip():
        raise UserError("the prompt is empty: write one, or take a test example")
    if len(prompt) > MAX_CHARACTERS:
        raise UserError(f"the prompt has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are allowed")


def pieces(lm: "LanguageModel", ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; special tokens by their name."""
    special = set(lm.tokenizer.all_special_ids)
    found: list[str] = []
    before = ""
    for end, token in enumerate(ids, start=1):
        text: str = lm.tokenizer.decode(ids[:end], skip_special_tokens=True)
        named = token in special
        found.append(lm.tokenizer.decode([token]) if named else text[len(before) :])
        before = text
    return found


def open_folder(folder: Path, compute: Compute) -> "LanguageModel":
    """A model of the pipeline, or one as it lies in the registry: an adapter there has its base beside it."""
    from tasks.lm.model import attach, load

    if not (folder / BASE).is_dir():
        return load(folder, compute)
    from tasks.lm.peft import open_adapter

    return attach(open_adapter(open_folder(folder / BASE, compute).model, folder, trainable=False), folder)
