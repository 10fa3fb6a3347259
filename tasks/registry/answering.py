"""What runs in a served model: requests in, answers out.

MLflow stores this file with the model and runs it where the model is loaded, beside a copy of the packages it
imports: the repository need not be there, and an old version answers with its own code. A request that cannot
be answered is told what is wrong with it (HTTP 400).
"""

import difflib
import json
import threading
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails


class Request(BaseModel):
    """A prompt, and what shall differ from the generation settings that the model was evaluated with."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, gt=0)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    num_beams: int | None = Field(default=None, ge=1, le=16)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    @model_validator(mode="wrap")
    @classmethod
    def _in_plain_words(cls, value: Any, handler: ModelWrapValidatorHandler["Request"]) -> "Request":
        try:
            return handler(value)
        except ValidationError as error:
            raise wrong("; ".join(_problem(fault) for fault in error.errors())) from None

    def settings(self) -> dict[str, Any]:
        """What the request sets, besides its prompt."""
        return self.model_dump(exclude={"prompt"}, exclude_none=True)


class Answering(PythonModel):  # type: ignore[misc]
    """Answers requests with the packed model, one call at a time."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the model and its settings."""
        from tasks.stage import Compute

        packed = Path(context.artifacts["packed"])
        self.settings = json.loads((packed / "settings.json").read_text(encoding="utf-8"))
        compute = Compute(**self.settings["compute"])
        self.lm = open_packed(packed / "model", compute, self.settings["int8_kernels"])
        self.turn = threading.Lock()  # a server calls from several threads, and the random state is one

    def predict(self, model_input: list[Request]) -> list[str]:
        """Answer each request, in the order given; those with the same settings are answered in one batch."""
        from tasks.lm.respond import respond

        self._check(model_input)
        alike: dict[str, list[int]] = {}
        for row, request in enumerate(model_input):
            alike.setdefault(json.dumps(request.settings(), sort_keys=True), []).append(row)
        asked = {
            key: {**self.settings["generation"], "seed": self.settings["seed"], **json.loads(key)}
            for key in alike
        }
        seeds = {key: settings.pop("seed") for key, settings in asked.items()}
        for settings in asked.values():
            check_generation(settings)
        answers = [""] * len(model_input)
        for key, rows in alike.items():
            with self.turn:
                found = respond(
                    self.lm,
                    [model_input[row].prompt for row in rows],
                    asked[key],
                    batch_size=self.settings["batch_size"],
                    seed=seeds[key],
                    max_prompt_tokens=self.settings["max_prompt_tokens"],
                )
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers

    def _check(self, requests: list[Request]) -> None:
        limits = self.settings["limits"]
        if len(requests) > limits["prompts"]:
            raise wrong(f"{len(requests)} prompts in one request; at most {limits['prompts']} are allowed")
        for row, request in enumerate(requests):
            if len(request.prompt) > limits["characters"]:
                raise wrong(
                    f"prompt {row} has {len(request.prompt)} characters; {limits['characters']} are allowed"
                )
            if (request.max_new_tokens or 0) > limits["max_new_tokens"]:
                raise wrong(
                    f"max_new_tokens is {request.max_new_tokens}; at most {limits['max_new_tokens']} is allowed"
                )


def open_packed(folder: Path, compute: Any, int8_kernels: bool = False) -> Any:
    """Open a packed model; an adapter that was kept apart goes on the base that lies in its folder.

    Raises UserError when a model that is not int8 shall answer with int8 kernels.
    """
    from tasks.lm.model import attach, load

    if int8_kernels:
        from tasks.compress.kernels import load_int8

        return load_int8(folder, compute)
    if not (folder / "base").is_dir():
        return load(folder, compute)
    from tasks.lm.peft import open_adapter

    base = open_packed(folder / "base", compute)
    return attach(open_adapter(base.model, folder, trainable=False), folder)


def check_generation(settings: dict[str, Any]) -> None:
    """Raise MlflowException (HTTP 400) for settings that contradict each other."""
    from transformers import GenerationConfig

    try:
        GenerationConfig(**settings).validate(strict=True)
    except ValueError as error:
        raise wrong(" ".join(str(error).split())) from None


def wrong(reason: str) -> MlflowException:
    """The refusal of a request: the server answers 400 with the reason."""
    return MlflowException.invalid_parameter_value(reason)


def _problem(fault: ErrorDetails) -> str:
    name = ".".join(str(step) for step in fault["loc"])
    if fault["type"] == "extra_forbidden":
        allowed = list(Request.model_fields)
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name}: no such setting{hint}; allowed: {', '.join(allowed)}"
    if fault["type"] == "missing":
        return f"{name}: missing"
    return f"{name}: {fault['msg']}"


set_model(Answering())
