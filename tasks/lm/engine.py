"""Answers from vLLM, for models that one process would answer with too slowly.

vLLM wants versions of torch and transformers of its own, so it lives in an environment of its own and is asked
through a pipe (tasks/lm/engine_process.py). Before each round of answers it is given the weights of a model as
files, adapters merged in. It listens on the loopback alone, to itself, and ends with the stage, however that
ends.
"""

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from tasks.lm import engine_process
from tasks.lm.engine_settings import EngineSettings
from tasks.lm.model import LanguageModel, bare, is_adapter
from tasks.stage import ParamsError, UserError

SHARD = 2**30  # bytes of weights in a file
LOG_LINES = 3  # of the engine's last words, in an error
NAMES_IN_VLLM = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
}
FIELDS_OF_CHANCE = ("temperature", "top_k", "top_p", "min_p")


class Answers(NamedTuple):
    """An answer to each of N prompts."""

    ids: list[list[int]]  # its end token included
    logprobs: list[list[float]]  # under the distribution that was sampled from


class Engine:
    """A vLLM process that answers as models of one architecture do.

    Args:
        lm: a model of that architecture, whose weights it starts with.
        longest: tokens of the longest prompt with its answer.
        folder: where weights and the engine's log go.

    Raises ParamsError for an encoder-decoder model, which vLLM has none of, and where there is no such
    interpreter, and UserError when vLLM cannot start.
    """

    def __init__(self, settings: EngineSettings, lm: LanguageModel, longest: int, folder: Path) -> None:
        if lm.is_encoder_decoder:
            raise ParamsError("engine: vLLM has no encoder-decoder models; set it to null")
        if shutil.which(settings.python) is None:
            raise ParamsError(f"engine.python: there is no {settings.python}; `make vllm` sets one up")
        self._folder, self._log = folder / "weights", folder / "engine.log"
        self._ends = _ends(lm)
        on_gpu = lm.device.type == "cuda"
        self._dtype = torch.bfloat16 if on_gpu else torch.float32
        shutil.rmtree(folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        config = copy.deepcopy(bare(lm).config)
        config.tie_word_embeddings = False  # new weights of a tied head do not reach vLLM's kernels for CPUs
        config.save_pretrained(self._folder)
        self._write(lm)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [settings.python, str(engine_process.__file__)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env=_environment(on_gpu),
            )  # fmt: skip
        options = {"model": str(self._folder), "max_model_len": longest, "enforce_eager": not on_gpu}
        options |= {"dtype": str(self._dtype).removeprefix("torch."), "seed": 0}
        try:
            self._ask(options | ({"gpu_memory_utilization": settings.memory} if on_gpu else {}))
        except BaseException:
            self.close()
            raise

    def take(self, lm: LanguageModel) -> None:
        """From now on answer as `lm` does, its adapter counted in unless it is off."""
        self._write(lm)
        self._ask({"weights": str(self._folder)})

    def answers(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Mapping[str, Any]
    ) -> Answers:
        """An answer to each prompt (token ids), drawn with a seed of its own.

        `sampling` has fields of vLLM's `SamplingParams`.
        """
        asked = {"stop_token_ids": self._ends, **sampling}
        found = self._ask({"prompts": [list(ids) for ids in prompts], "seeds": list(seeds), "sampling": asked})
        return Answers(found["ids"], found["logprobs"])

    def close(self) -> None:
        """End the process, and remove the weights."""
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, lm: LanguageModel) -> None:
        for old in self._folder.glob("*.safetensors"):
            old.unlink()
        shard: dict[str, Tensor] = {}
        for name, tensor in whole_weights(lm):
            shard[name] = tensor.detach().to("cpu", self._dtype, copy=True).contiguous()
            if sum(each.nbytes for each in shard.values()) > SHARD:
                self._save(shard)
                shard = {}
        self._save(shard)

    def _save(self, shard: dict[str, Tensor]) -> None:
        number = len(list(self._folder.glob("*.safetensors")))
        save_file(shard, self._folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_LINES:]
            raise UserError(f"vLLM ended with code {code}: {' '.join(said)} ({self._log} has all of it)")
        return json.loads(line)


def takes(lm: LanguageModel) -> bool:
    """Whether an engine can answer as `lm`: it is causal, no weight is quantised, and LoRA its only adapter."""
    from peft import LoraConfig

    adapted = is_adapter(lm) and not isinstance(lm.model.active_peft_config, LoraConfig)
    quantised = getattr(lm.model.config, "quantization_config", None) is not None
    return not (lm.is_encoder_decoder or adapted or quantised)


def sampling_of(generation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fields of vLLM's `SamplingParams` that mean what those of `GenerationConfig` mean; None where none do."""
    by_chance = generation.get("do_sample", False)
    silent = {"do_sample", *(() if by_chance else FIELDS_OF_CHANCE)}
    fields = {
        name: value
        for name, value in generation.items()
        if name not in silent and (name, value) != ("num_beams", 1)
    }
    if "max_new_tokens" not in fields or not fields.keys() <= {*NAMES_IN_VLLM, *FIELDS_OF_CHANCE}:
        return None
    usual = {"temperature": 1.0, "top_k": 50} if by_chance else {"temperature": 0.0}
    return usual | {NAMES_IN_VLLM.get(name, name): value for name, value in fields.items()}


@torch.no_grad()
def whole_weights(lm: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of the model without adapter that answers as `lm` does, tied ones too."""
    from peft.tuners.lora import LoraLayer

    model = bare(lm)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owner, _, own = name.partition(".base_layer.")
        if not own:
            if ".lora_" not in name:
                yield name, weight
            continue
        module = adapted[owner]
        if own == "weight" and not module.disable_adapters:
            weight = weight + sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
        yield f"{owner}.{own}", weight


def _ends(lm: LanguageModel) -> list[int]:
    ends = lm.model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]


def _environment(on_gpu: bool) -> dict[str, str]:
    """That of the process: nothing of this one's packages, no telemetry, no hub, the loopback alone."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    told |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    if not on_gpu:
        told |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
    return kept | told
